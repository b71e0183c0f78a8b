"""Continuous batching: requests of ids in, ids out, a step at a time. Knows nothing about text.

Every request has a slot, a row of the KV cache, and its own position, sampling, generator and
budget. A step feeds each running request what is pending: a chunk of its prompt, or the id drawn
last. Requests come and go between steps (continuous batching, as in Orca, OSDI 2022).
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from llama.distributed import tensor_parallel
from llama.engine.forward import draw_at, hidden_of_chunks, score_prompt
from llama.engine.request import FinishReason, Request
from llama.engine.slots import Slot, Slots
from llama.model import Transformer


@dataclass(frozen=True)
class Event:
    """What a step did for a request.

    Attributes:
        id: as `Engine.add` returned it.
        token: the id generated; None for a stop token or where the request ended without one.
        logprob: of `token`, if the request asked for it.
        finish_reason: None while the request goes on.
    """

    id: int
    token: int | None = None
    logprob: float | None = None
    finish_reason: FinishReason | None = None


class Engine:
    """Generates for any number of requests, as many at once as the model's cache has rows.

    Its methods may be called from any thread; with several ranks from one, alike on each. What a
    request gets does not depend on the others, up to the rounding of its dtype, if it is greedy or
    has a seed.

    Args:
        model: its cache belongs to the engine from here on; another user of the cache (such as
            `model(tokens, start_pos)`) ends the requests that are running.
        prefill_chunk: most prompt positions computed in a step, shared by all prompts. It bounds
            the memory of a long prompt, and how long it holds up the others.
    """

    def __init__(self, model: Transformer, prefill_chunk: int = 512):
        if type(prefill_chunk) is not int or prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be a positive integer, not {prefill_chunk!r}")
        self.model = model
        self.prefill_chunk = prefill_chunk
        self._requests: dict[int, Request] = {}  # those not finished, by id
        self._waiting: deque[Request] = deque()  # for a slot
        self._slots: Slots | None = None
        self._added = 0
        self._changed = threading.Condition(threading.RLock())
        self._ended: list[Request] = []  # whose slots are to be freed
        self._stepper = 0  # the thread that steps
        self._telling = False  # a watcher runs
        self._thread = 0  # the only one, with several ranks

    def add(self, request: Request) -> int:
        """Queue a request, which takes part from the next step on; its id.

        Raises:
            TypeError, ValueError: the request cannot be run. Others are not touched.
        """
        self.check(request)
        if tensor_parallel.size() > 1:
            tensor_parallel.check_same_on_ranks(request.facts())
        with self._changed:
            request.begin(self._room(), self.model.norm.weight.device)
            self._added += 1
            request.id = self._added
            self._requests[request.id] = request
            self._waiting.append(request)
            return request.id

    def check(self, request: Request) -> None:
        """Raise the TypeError or ValueError that `add` would."""
        if not isinstance(request, Request):
            raise TypeError(f"add takes a Request, not {type(request)}")
        request.check(self.model.params.vocab_size, self._room())

    def _room(self) -> int:
        cache = next(self.model.attentions()).cache
        return self.model.params.max_seq_len if cache is None else cache.k.shape[1]

    def cancel(self, id: int) -> bool:
        """End a request and free its slot. False if it had ended already.

        Raises:
            ValueError: no request ever had this id.
        """
        with self._changed:
            if type(id) is not int or not 1 <= id <= self._added:
                raise ValueError(f"no request has the id {id!r}")
            request = self._requests.get(id)
            if request is None or request.finish_reason is not None:
                return False
            request.finish_reason = "cancelled"
            self._ended.append(request)
            if not self._stepper:  # else the end of the step frees it
                self._sweep()
            self._changed.notify_all()
            return True

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    def step(self) -> list[Event]:
        """Advance every request that has a slot; what happened, in no certain order.

        A request that cannot go on ends with the finish_reason "error"; nothing is raised. What
        another thread's steps, or those of `wait`, do is seen by the requests' watchers only.
        """
        with self._turn(lambda: False):
            return self._step()

    def wait(self, ready: Callable[[], object]) -> None:
        """Return once `ready()` is true, stepping unless another thread does."""
        while not ready():
            with self._turn(ready) as mine:
                if mine and not self.busy:
                    raise RuntimeError("nothing is left to run, and what was waited for is not so")
                if mine:
                    self._step()

    def forget(self) -> None:
        """Let no later request build upon what is cached now, as after a change of weights."""
        with self._turn(lambda: False):
            for slot in self._rows():
                slot.stale = True
                if slot.request is None:
                    slot.cached = []

    @contextmanager
    def _turn(self, ready: Callable[[], object]) -> Iterator[bool]:
        """Be the only thread that steps, or (False) find oneself ready through another's step."""
        me = threading.get_ident()
        if tensor_parallel.size() > 1 and self._thread not in (0, me):
            raise RuntimeError("with several ranks, one thread makes all calls, alike on each rank")
        with self._changed:
            self._thread = me
            if self._telling and self._stepper == me:
                raise RuntimeError("a watcher cannot make a step within a step")
            # A step of this thread that an interrupt ended may not have said so.
            self._changed.wait_for(lambda: ready() or self._stepper in (0, me))
            mine = not ready()
            if mine:
                self._stepper = me
        try:
            yield mine
        finally:
            if mine:
                with self._changed:
                    self._stepper = 0
                    self._changed.notify_all()
                    self._sweep()

    def _sweep(self) -> None:
        """Free the slots of requests that have ended."""
        while self._ended:
            request = self._ended.pop()
            self._requests.pop(request.id, None)
            held = [slot for slot in self._rows() if slot.request is request]
            for slot in held:
                slot.release()
            if not held and request in self._waiting:
                self._waiting.remove(request)

    def _rows(self) -> list[Slot]:
        return self._slots.rows if self._slots else []

    @torch.inference_mode()
    @tensor_parallel.ends_job_on_error()
    def _step(self) -> list[Event]:
        events: list[Event] = []
        slots = self._own_cache(events)
        events += self._admit(slots)
        self.model.cache_owner = None  # should an interrupt leave it half arranged
        decoding, prefilling = slots.arrange()
        self.model.cache_owner = self
        if decoding:
            events += self._advance(decoding, 0, 1)
        if prefilling:
            share = max(1, self.prefill_chunk // len(prefilling))
            # The padding must not pass the end of the cache.
            share = min(share, slots.room - max(len(slot.cached) for slot in prefilling))
            events += self._advance(prefilling, len(decoding), share)
        return events

    def _own_cache(self, events: list[Event]) -> Slots:
        """The slots; anew, and without the requests that ran, if the cache changed hands."""
        if self._slots is None or self.model.cache_owner is not self:
            for slot in self._rows():
                if slot.request is not None:
                    slot.request.fail(RuntimeError("another user of the cache wrote over this"))
                    events.append(self._tell(slot.request))
            if next(self.model.attentions()).cache is None:
                params = self.model.params
                self.model.setup_cache(params.max_batch_size, params.max_seq_len)
            self._slots = Slots(self.model)
        return self._slots

    def _admit(self, slots: Slots) -> list[Event]:
        """Give free slots to those who wait, first come, first served."""
        events = []
        with self._changed:
            for slot in slots.rows:  # an interrupt may have kept an end from being noted
                if slot.request is not None and slot.request.finish_reason is not None:
                    slot.release()
            while self._waiting:
                request = self._waiting[0]
                if request.budget == 0 and request.score_from is None:
                    request.finish_reason = "length"
                    events.append(self._tell(request))
                elif all(slot.request is not request for slot in slots.rows):
                    if not slots.free():
                        break
                    slots.place(request)
                self._waiting.popleft()
        return events

    def _advance(self, slots: Sequence[Slot], first_row: int, most: int) -> list[Event]:
        """Feed neighbouring slots at most `most` pending ids each; draw where none is left."""
        try:
            return self._feed(slots, first_row, most)
        except Exception as e:  # such as memory that ran out: the others need not suffer
            if tensor_parallel.size() > 1:  # nor may this rank go on without the others
                raise
            for slot in slots:
                slot.running.fail(e)
            return [self._tell(slot.running) for slot in slots]

    def _feed(self, slots: Sequence[Slot], first_row: int, most: int) -> list[Event]:
        """Compute all, then note it: what an interrupt keeps from being noted is done again."""
        starts = [len(slot.cached) for slot in slots]
        chunks = [
            slot.running.tokens[start : start + most]
            for slot, start in zip(slots, starts, strict=True)
        ]
        h = hidden_of_chunks(self.model, chunks, starts, first_row)
        scored = [
            score_prompt(self.model, slot.running, h[i], starts[i], len(chunks[i]))
            for i, slot in enumerate(slots)
        ]
        last = [  # where in `h` the next ids are predicted
            (slot.running, i * h.shape[1] + len(chunks[i]) - 1)
            for i, slot in enumerate(slots)
            if slot.pending == len(chunks[i]) and slot.running.budget > 0
        ]
        drawn = draw_at(self.model, h, last) if last else {}
        events = []
        for slot, start, chunk, scores in zip(slots, starts, chunks, scored, strict=True):
            request = slot.running
            slot.written = max(slot.written, start + h.shape[1])
            whole = slot.pending == len(chunk)
            token, logprob = drawn.get(request.id, (None, 0.0))
            before = len(request.tokens)
            if not all(map(math.isfinite, [*scores, logprob])):
                request.fail(ValueError(f"{request.name} made the model's logits not a number"))
            elif token is not None:
                request.take(token, logprob)
            elif whole and request.finish_reason is None:  # it was to be scored
                request.finish_reason = "length"
            request.prompt_logprobs += scores
            slot.cached += chunk
            if whole or request.finish_reason is not None:
                new = len(request.tokens) > before
                events.append(self._tell(request, token if new else None, logprob))
        return events

    def _tell(self, request: Request, token: int | None = None, logprob: float = 0.0) -> Event:
        """Let the request's watcher see it; the event of it."""
        if request.watch is not None:
            self._telling = True
            try:
                request.watch()
            except Exception as e:
                request.fail(e)
            finally:
                self._telling = False
        if request.finish_reason is not None:
            self._ended.append(request)
        score = logprob if request.logprobs and token is not None else None
        return Event(request.id, token, score, request.finish_reason)
