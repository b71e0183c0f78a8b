"""Continuous batching: requests of ids in, ids out, a step at a time. Knows nothing about text.

Every request has a slot, a row of the KV cache, and its own position, sampling, generator and
budget. A step feeds each running request its pending ids: a chunk of its prompt, or the id drawn
last. Requests come and go between steps (continuous batching, as in Orca, OSDI 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from time import perf_counter

import torch

from llama.common.errors import refuse_copies
from llama.distributed import agreement, tensor_parallel
from llama.engine.admission import admit, fail_running
from llama.engine.checks import check_chunk, check_count, check_one_clock
from llama.engine.compiled_step import CompiledStep, compile_step
from llama.engine.draft import Draft
from llama.engine.forward import Chunk, compute
from llama.engine.metrics import EngineMetrics
from llama.engine.record import record
from llama.engine.request import Event, FinishReason, Generation, Request
from llama.engine.slots import Slot, Slots
from llama.engine.speculation import Speculation, Speculator
from llama.engine.turns import Turns
from llama.engine.unfinished import Unfinished, check_siblings, note_draws
from llama.layers.adapter_rows import adapter_names
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
        max_queue: most requests that wait for a slot; None is no limit. It may be changed.
        speculation: proposes ids and checks several in a step; None: a step is one id a request.
        draft: a model that also proposes them.
    """

    def __init__(
        self,
        model: Transformer,
        prefill_chunk: int | None = None,
        max_seq_len: int | None = None,
        max_queue: int | None = None,
        speculation: Speculation | None = None,
        draft: Draft | None = None,
    ):
        if max_queue is not None:
            check_count("max_queue", max_queue)
        self.model, self.max_queue = model, max_queue
        self.prefill_chunk = check_chunk(prefill_chunk, model.norm.weight.is_cuda)
        self.room = model.params.max_seq_len if max_seq_len is None else max_seq_len
        self.cache = model.new_cache(model.params.max_batch_size, self.room)
        self.compiled: CompiledStep | None = None
        self.steps = 0  # made so far
        self._seconds = [0.0, 0.0]  # of decode, of prefill
        self._slots, self.speculator = Slots(self.cache), Speculator(speculation, draft)
        self._arranged = True  # whether the cache's rows are in the slots' order
        self._unfinished = Unfinished(len(self._slots.rows), self.room)
        self._turns = Turns()
        self._closed = False

    __reduce_ex__ = refuse_copies

    def compile(self) -> bool:
        """Decode by a compiled step from now on; False, with a warning, where that fails.

        Errors: see `compile_step`.
        """
        if self._unfinished.added:
            raise RuntimeError("compile before the first request: compiling uses the cache")
        self.compiled = compile_step(self.model, self.cache)
        return self.compiled is not None

    def add(self, request: Request) -> Generation:
        """Queue a request, which takes part from the next step on.

        Raises:
            TypeError, ValueError: the request cannot be run. Others are not touched.
            QueueFull: max_queue requests wait already.
        """
        generation = Generation(request)
        self.queue(generation)
        return generation

    def queue(self, generation: Generation) -> None:
        """As `add`. Whoever made the generation can cancel it whenever an interrupt comes."""
        self.queue_siblings([generation])

    def queue_siblings(self, generations: Sequence[Generation]) -> None:
        """Queue several answers to one prompt, all or none. The prompt is computed once.

        The first one computes it, and the others begin with a copy, also without `reuse`.

        Raises:
            TypeError, ValueError, QueueFull: as `add`; or their prompts differ.
        """
        for generation in generations:
            self.check(generation.request)
            check_siblings(generations[0].request, generation.request)
            if tensor_parallel.size() > 1:
                agreement.check_same_on_ranks(generation.request.shared_fields())
        note_draws(generations)
        with self._turns.changed:
            self._check_open()  # again: another thread may have closed the engine
            self._unfinished.add(generations, self.max_queue)

    def check(self, request: Request) -> None:
        """Raise the TypeError or ValueError that `add` would."""
        if not isinstance(request, Request):
            raise TypeError(f"add takes a Request, not {type(request)}")
        with self._turns.changed:
            self._check_open()
            request.check(self.model.params.vocab_size, self.room, adapter_names(self.model))
        check_one_clock(request.time_limit, tensor_parallel.size())

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this engine is closed; build another Llama")

    def cancel(self, id: int, reason: FinishReason = "cancelled") -> bool:
        """End a request and free its slot. False if it had ended already.

        Args:
            reason: its finish_reason; "stop" if what was generated so far is the whole answer.

        Raises:
            ValueError: no request ever had this id.
        """
        with self._turns.changed:
            if type(id) is not int or not 1 <= id <= self._unfinished.added:
                raise ValueError(f"no request has the id {id!r}")
            generation = self._unfinished.get(id)
            if generation is None or generation.finish_reason is not None:
                return False
            generation.end(reason)
            if not self._turns.stepping:  # otherwise the end of the step frees it
                self._sweep()
            self._turns.changed.notify_all()
            return True

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return any(g.finish_reason is None for g in self._unfinished)

    @property
    def waiting(self) -> int:
        """How many requests wait for a slot."""
        return self._unfinished.waiting

    def metrics(self) -> EngineMetrics:
        """What was done so far and what is left, at one moment."""
        with self._turns.changed:
            now, (decode, prefill) = self._unfinished.metrics(), self._seconds
        return replace(now, steps=self.steps, prefill_seconds=prefill, decode_seconds=decode)

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
        siblings: int = 1,
    ) -> list[Generation]:
        """Run requests to the end. Refused and failed ones have the finish_reason "error".

        Args:
            after_step: called between steps; it may cancel requests.
            siblings: each so many neighbours are answers to one prompt; see `queue_siblings`.
        """
        generations = [Generation(request) for request in requests]
        try:
            for i in range(0, len(generations), siblings):
                self._queue_or_fail(generations[i : i + siblings])
            while not all(g.finish_reason for g in generations):
                self._wait_for_step(generations)
                if after_step is not None:
                    after_step(generations)
        finally:
            for generation in generations:
                if generation.id:
                    self.cancel(generation.id)
        return generations

    def _queue_or_fail(self, siblings: Sequence[Generation]) -> None:
        try:
            self.queue_siblings(siblings)
        except ValueError as e:
            for generation in siblings:
                generation.fail(e)

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
            for generation in self._unfinished:
                self.cancel(generation.id)
        with self._turns.changed:
            self.compiled, self.cache = None, []
            self._slots.cache, self._slots.rows, self.speculator.draft = [], [], None
            del self.model

    def _turn(self, ready: Callable[[], object] = lambda: False) -> AbstractContextManager[bool]:
        return self._turns.take(ready, self._sweep)

    def _sweep(self) -> None:
        """Free the slots of requests that have ended."""
        self._unfinished.sweep(self._slots.release)

    @torch.inference_mode()
    @tensor_parallel.ends_job_on_error()
    def _step(self) -> list[Event]:
        self._check_open()
        events = [] if self._arranged else self._start_over()
        events += admit(self._unfinished, self._slots, self._turns.changed)
        self._arranged = False  # in case an interrupt comes while rows change places
        decoding, prefilling = self._slots.arrange()
        self._arranged = True
        start = perf_counter()
        if decoding:
            proposals = self.speculator.propose(decoding, self._slots.rows, self.room)
            events += self._advance(decoding, Chunk.of(decoding, 1, proposals), 0)
        middle = perf_counter()
        if prefilling:
            share = max(1, self.prefill_chunk // len(prefilling))
            # The padding must not pass the end of the cache.
            share = min(share, self.room - max(len(slot.cached) for slot in prefilling))
            events += self._advance(prefilling, Chunk.of(prefilling, share), len(decoding))
        decode, prefill = self._seconds
        self._seconds = [decode + middle - start, prefill + perf_counter() - middle]
        self.steps += 1
        return events

    def _start_over(self) -> list[Event]:
        """New slots, after an interrupt has left the cache's rows in an unknown order."""
        events = fail_running(self._slots, "an interrupt lost this request's cache")
        self._slots = Slots(self.cache)
        return events

    def _advance(
        self, slots: Sequence[Slot], chunks: Sequence[Chunk], first_row: int
    ) -> list[Event]:
        """Feed each slot its chunk. Compute, then update: an interrupt only repeats."""
        try:
            found = compute(self.model, self.cache, chunks, first_row, self.compiled)
            return record(slots, *found)
        except Exception as e:  # such as out of memory: the other requests go on
            if tensor_parallel.size() > 1:  # this rank must not go on without the others
                raise
            for slot in slots:
                slot.running.fail(e)
            return [slot.running.event() for slot in slots]
