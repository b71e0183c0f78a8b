"""Continuous batching: requests of ids in, ids out, a step at a time. Knows nothing about text.

Every request has a slot, a row of the KV cache, and its own position, sampling, generator and
budget. A step feeds each running request its pending ids: a chunk of its prompt, or the id drawn
last. Requests come and go between steps (continuous batching, as in Orca, OSDI 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from llama.common.errors import refuse_copies
from llama.distributed import tensor_parallel
from llama.engine.compiled_step import CompiledStep, compile_step
from llama.engine.forward import Chunk, compute
from llama.engine.request import Event, FinishReason, Generation, Request
from llama.engine.slots import Slot, Slots
from llama.engine.turns import Turns
from llama.model import Transformer


class Engine:
    """Generates for any number of requests, as many at once as its cache has rows.

    Its methods may be called from any thread; with several ranks from one, with the same calls on
    each rank. A request that is greedy or has a seed gets the same ids whatever runs beside it, up
    to the rounding of the model's dtype.

    Args:
        model: its params size the cache: max_batch_size rows of max_seq_len positions.
        prefill_chunk: most prompt positions computed in a step, shared by all prompts. It bounds
            the memory of a long prompt, and how long that delays the other requests. None: 2048
            on a GPU, whose matmuls need many rows, and 512 elsewhere.
        max_seq_len: fewer positions than the model's.
    """

    def __init__(
        self, model: Transformer, prefill_chunk: int | None = None, max_seq_len: int | None = None
    ):
        if prefill_chunk is None:
            prefill_chunk = 2048 if model.norm.weight.is_cuda else 512
        if type(prefill_chunk) is not int or prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be a positive integer, not {prefill_chunk!r}")
        self.model = model
        self.prefill_chunk = prefill_chunk
        self.room = model.params.max_seq_len if max_seq_len is None else max_seq_len
        self.cache = model.new_cache(model.params.max_batch_size, self.room)
        self.compiled: CompiledStep | None = None
        self.steps = 0  # made so far
        self._slots = Slots(self.cache)
        self._arranged = True  # whether the cache's rows are in the slots' order
        # Those not finished, by id, in their order. Only this says who has ended (those with a
        # finish_reason, until `_sweep`) and who waits (those without a slot): an interrupt
        # between two such lists would make them disagree.
        self._requests: dict[int, Generation] = {}
        self._added = 0
        self._turns = Turns()
        self._closed = False

    __reduce_ex__ = refuse_copies

    def compile(self) -> bool:
        """Decode by a compiled step from now on; False, with a warning, where that fails."""
        if self._added:
            raise RuntimeError("compile before the first request: compiling uses the cache")
        self.compiled = compile_step(self.model, self.cache)
        return self.compiled is not None

    def add(self, request: Request) -> Generation:
        """Queue a request, which takes part from the next step on.

        Raises:
            TypeError, ValueError: the request cannot be run. Others are not touched.
        """
        generation = Generation(request)
        self.queue(generation)
        return generation

    def queue(self, generation: Generation) -> None:
        """As `add`. Whoever made the generation can cancel it whenever an interrupt comes."""
        request = generation.request
        self.check(request)
        if tensor_parallel.size() > 1:
            tensor_parallel.check_same_on_ranks(request.shared_fields())
        with self._turns.changed:
            self.check(request)  # again: another thread may have closed the engine
            self._added += 1
            generation.begin(self._added, self.room)
            self._requests[generation.id] = generation

    max_queue: int | None = None

    @property
    def waiting(self) -> int:
        placed = {s.generation.id for s in self._slots.rows if s.generation is not None}
        return sum(g.finish_reason is None and g.id not in placed for g in self._requests.values())

    def queue_siblings(self, generations: Sequence[Generation]) -> None:
        for generation in generations:
            self.queue(generation)

    def check(self, request: Request) -> None:
        """Raise the TypeError or ValueError that `add` would."""
        if not isinstance(request, Request):
            raise TypeError(f"add takes a Request, not {type(request)}")
        with self._turns.changed:
            if self._closed:
                raise RuntimeError("this engine is closed; build another Llama")
            request.check(self.model.params.vocab_size, self.room)

    def cancel(self, id: int, reason: FinishReason = "cancelled") -> bool:
        """End a request and free its slot. False if it had ended already.

        Args:
            reason: its finish_reason; "stop" if what was generated so far is the whole answer.

        Raises:
            ValueError: no request ever had this id.
        """
        with self._turns.changed:
            if type(id) is not int or not 1 <= id <= self._added:
                raise ValueError(f"no request has the id {id!r}")
            generation = self._requests.get(id)
            if generation is None or generation.finish_reason is not None:
                return False
            generation.finish_reason = reason
            if not self._turns.stepping:  # otherwise the end of the step frees it
                self._sweep()
            self._turns.changed.notify_all()
            return True

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return any(g.finish_reason is None for g in list(self._requests.values()))

    def step(self) -> list[Event]:
        """Advance every request that has a slot; the events, in no particular order.

        A request that cannot go on ends with the finish_reason "error"; nothing is raised. Events
        of the steps that other threads make, and `wait`, are not returned: read the generations.
        """
        with self._turn():
            return self._step()

    def wait(self, ready: Callable[[], object]) -> None:
        """Step, or let another thread step, until `ready()`; RuntimeError if nothing is left."""
        while not ready():
            with self._turn(ready) as mine:
                if mine and not self.busy:
                    raise RuntimeError("no request is left to run, and `ready()` is still false")
                if mine:
                    self._step()

    def run(
        self,
        requests: Sequence[Request],
        after_step: Callable[[Sequence[Generation]], object] | None = None,
    ) -> list[Generation]:
        """Run requests to the end. Refused and failed ones have the finish_reason "error".

        Args:
            after_step: called between steps; it may cancel requests.
        """
        generations = [Generation(request) for request in requests]
        try:
            for generation in generations:
                try:
                    self.queue(generation)
                except ValueError as e:
                    generation.fail(e)
            while not all(g.finish_reason for g in generations):
                self._wait_for_step(generations)
                if after_step is not None:
                    after_step(generations)
        finally:
            for generation in generations:
                if generation.id:
                    self.cancel(generation.id)
        return generations

    def _wait_for_step(self, generations: Sequence[Generation]) -> None:
        """Make a step, or wait for another thread's, unless all of these have ended."""
        steps = self.steps
        self.wait(lambda: self.steps != steps or all(g.finish_reason for g in generations))

    def forget(self) -> None:
        """Let no later request reuse what is cached now, for example after a change of weights."""
        with self._turn():
            for slot in self._slots.rows:
                slot.stale = True
                if slot.generation is None:
                    slot.cached = []

    def close(self) -> None:
        """Cancel all requests and let go of the model and the cache."""
        with self._turn():
            if self._closed:
                return
            self._closed = True
            for id in list(self._requests):
                self.cancel(id)
        with self._turns.changed:
            self.compiled, self.cache = None, []
            self._slots.cache, self._slots.rows = [], []
            del self.model

    def _turn(self, ready: Callable[[], object] = lambda: False) -> AbstractContextManager[bool]:
        return self._turns.take(ready, self._sweep)

    def _sweep(self) -> None:
        """Free the slots of requests that have ended."""
        for generation in list(self._requests.values()):
            if generation.finish_reason is not None:
                self._slots.release(generation)
                self._requests.pop(generation.id, None)  # last, in case an interrupt comes

    @torch.inference_mode()
    @tensor_parallel.ends_job_on_error()
    def _step(self) -> list[Event]:
        if self._closed:
            raise RuntimeError("this engine is closed; build another Llama")
        events = [] if self._arranged else self._start_over()
        events += self._admit()
        self._arranged = False  # in case an interrupt comes while rows change places
        decoding, prefilling = self._slots.arrange()
        self._arranged = True
        if decoding:
            events += self._advance(decoding, 0, 1)
        if prefilling:
            share = max(1, self.prefill_chunk // len(prefilling))
            # The padding must not pass the end of the cache.
            share = min(share, self.room - max(len(slot.cached) for slot in prefilling))
            events += self._advance(prefilling, len(decoding), share)
        self.steps += 1
        return events

    def _start_over(self) -> list[Event]:
        """New slots, after an interrupt has left the cache's rows in an unknown order."""
        events = []
        for slot in self._slots.rows:
            if slot.generation is not None and slot.generation.finish_reason is None:
                slot.generation.fail(RuntimeError("an interrupt lost this request's cache"))
                events.append(slot.generation.event())
        self._slots = Slots(self.cache)
        return events

    def _admit(self) -> list[Event]:
        """Give free slots to those who wait, first come, first served."""
        events, slots = [], self._slots
        with self._turns.changed:
            self._sweep()
            placed = {slot.running.id for slot in slots.rows if slot.generation is not None}
            for generation in list(self._requests.values()):
                if generation.id in placed:
                    continue
                if generation.budget == 0 and generation.request.score_from is None:
                    generation.finish_reason = "length"
                    events.append(generation.event())
                elif slots.free():
                    slots.place(generation)
                else:
                    break
        return events

    def _advance(self, slots: Sequence[Slot], first_row: int, most: int) -> list[Event]:
        """Run the model on at most `most` pending ids of each slot; draw where none is left."""
        try:
            return self._feed(slots, first_row, most)
        except Exception as e:  # such as out of memory: the other requests go on
            if tensor_parallel.size() > 1:  # this rank must not go on without the others
                raise
            for slot in slots:
                slot.running.fail(e)
            return [slot.running.event() for slot in slots]

    def _feed(self, slots: Sequence[Slot], first_row: int, most: int) -> list[Event]:
        """Compute first, then update. What an interrupt keeps from being updated is repeated."""
        chunks = [Chunk.pending(slot.running, len(slot.cached), most) for slot in slots]
        width, scored, drawn = compute(self.model, self.cache, chunks, first_row, self.compiled)
        events = []
        for slot, chunk, scores in zip(slots, chunks, scored, strict=True):
            generation = slot.running
            slot.written = max(slot.written, chunk.start + width)
            token, logprob = drawn.get(generation.id, (None, 0.0))
            before = len(generation.tokens)
            generation.add_scores(chunk.start, scores)  # before its end is visible to other threads
            if not all(map(math.isfinite, [*scores, logprob])):
                name = generation.request.name
                generation.fail(ValueError(f"{name} made the model's logits not a number"))
            elif token is not None:
                generation.append(token, logprob)
            elif chunk.whole and generation.finish_reason is None:  # it was only to be scored
                generation.finish_reason = "length"
            slot.cached += chunk.ids
            if chunk.whole or generation.finish_reason is not None:
                new = len(generation.tokens) > before
                events.append(generation.event(token if new else None, logprob))
        return events
