"""Continuous batching: requests of ids in, ids out, a step at a time. Knows nothing about text.

Every request has a slot, a row of the KV cache, and its own position, sampling, generator and
budget. A step feeds each running request what is pending: a chunk of its prompt, or the id drawn
last. Requests come and go between steps (continuous batching, as in Orca, OSDI 2022).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.model import Transformer
from llama.passes import chosen_logprobs, draw, hidden_of_chunks, score_prompt
from llama.request import FinishReason, Request
from llama.slots import Slot, Slots


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

    Its methods may be called from any thread. What a request gets does not depend on the others,
    up to the rounding of its dtype, if it is greedy or has a seed.

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
        self._stepping = False

    def add(self, request: Request) -> int:
        """Queue a request; it takes part from the next step on.

        Returns:
            its id.

        Raises:
            TypeError, ValueError: the request cannot be run. Others are not touched.
        """
        request.check(self.model.params)
        with self._changed:
            request.begin(self.model.params.max_seq_len, self.model.norm.weight.device)
            self._added += 1
            request.id = self._added
            self._requests[request.id] = request
            self._waiting.append(request)
            return request.id

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
            if not self._stepping:  # else the end of the step frees it
                self._sweep()
            self._changed.notify_all()
            return True

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._requests)

    def step(self) -> list[Event]:
        """Advance every request that has a slot; what happened, in no certain order.

        A request that cannot go on ends with the finish_reason "error"; nothing is raised.
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
            for slot in self._slots.rows if self._slots else ():
                slot.cached = slot.cached if slot.request else []

    @contextmanager
    def _turn(self, ready: Callable[[], object]) -> Iterator[bool]:
        """Be the only thread that steps, or (False) find oneself ready through another's step."""
        with self._changed:
            self._changed.wait_for(lambda: ready() or not self._stepping)
            mine = not ready()
            if mine:
                self._stepping = True
        try:
            yield mine
        finally:
            if mine:
                with self._changed:
                    self._stepping = False
                    self._sweep()
                    self._changed.notify_all()

    def _sweep(self) -> None:
        """Free the slots of requests that have ended."""
        for slot in self._slots.rows if self._slots else ():
            if slot.request is not None and slot.request.finish_reason is not None:
                slot.release()
        ended = [r for r in self._requests.values() if r.finish_reason is not None]
        for request in ended:
            del self._requests[request.id]
            if request in self._waiting:
                self._waiting.remove(request)

    @torch.inference_mode()
    def _step(self) -> list[Event]:
        slots = self._own_cache()
        events = self._admit(slots)
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

    def _own_cache(self) -> Slots:
        """The slots; anew, and without the requests that ran, if the cache changed hands."""
        if self._slots is None or self.model.cache_owner is not self:
            for slot in self._slots.rows if self._slots else ():
                if slot.request is not None:
                    slot.request.fail(RuntimeError("another user of the cache wrote over this"))
                    self._tell(slot.request)
            if next(self.model.attentions()).cache is None:
                params = self.model.params
                self.model.setup_cache(params.max_batch_size, params.max_seq_len)
            self._slots = Slots(self.model)
        return self._slots

    def _admit(self, slots: Slots) -> list[Event]:
        """Give free slots to those who wait, first come, first served."""
        events = []
        with self._changed:
            while self._waiting:
                request = self._waiting[0]
                if request.budget == 0 and request.score_from is None:
                    request.finish_reason = "length"
                    events.append(self._tell(request))
                elif slots.free():
                    slots.place(request)
                else:
                    break
                self._waiting.popleft()
        return events

    def _advance(self, slots: Sequence[Slot], first_row: int, most: int) -> list[Event]:
        """Feed neighbouring slots at most `most` pending ids each; draw where none is left."""
        try:
            return self._feed(slots, first_row, most)
        except Exception as e:  # such as memory that ran out: the others need not suffer
            for slot in slots:
                slot.running.fail(e)
            return [self._tell(slot.running) for slot in slots]

    def _feed(self, slots: Sequence[Slot], first_row: int, most: int) -> list[Event]:
        starts = [len(slot.cached) for slot in slots]
        chunks = [
            slot.running.tokens[start : start + most]
            for slot, start in zip(slots, starts, strict=True)
        ]
        h = hidden_of_chunks(self.model, chunks, starts, first_row)
        last: list[int] = []  # where in `h` the next ids are predicted
        requests: list[Request] = []
        events: list[Event] = []
        for i, (slot, start, chunk) in enumerate(zip(slots, starts, chunks, strict=True)):
            slot.cached += chunk
            slot.written = max(slot.written, start + h.shape[1])
            request = slot.running
            score_prompt(self.model, request, h[i], start, len(chunk))
            if slot.pending or request.finish_reason is not None:
                continue
            if request.budget == 0:  # it was scored
                request.finish_reason = "length"
                events.append(self._tell(request))
            else:
                last.append(i * h.shape[1] + len(chunk) - 1)
                requests.append(request)
        if requests:
            index = torch.tensor(last, device=h.device)
            logits = self.model.logits(h.flatten(0, 1).index_select(0, index))
            events += self._draw(requests, logits)
        return events

    def _draw(self, requests: Sequence[Request], logits: Tensor) -> list[Event]:
        """The next id of each request. A row whose logits are not numbers fails alone."""
        finite = logits.amax(-1).isfinite().tolist()
        if not all(finite):
            logits = logits.nan_to_num(0.0, 0.0)
        drawn = draw(requests, logits)
        scores = [0.0] * len(requests)
        if any(request.logprobs for request in requests):
            scores = chosen_logprobs(logits, drawn).tolist()
        events = []
        for row in zip(requests, drawn.tolist(), scores, finite, strict=True):
            request, token, score, is_number = row
            if is_number:
                request.take(token, score)
                events.append(self._tell(request, token, score))
            else:
                request.fail(ValueError(f"{request.name} made the model's logits not a number"))
                events.append(self._tell(request))
        return events

    def _tell(self, request: Request, token: int | None = None, logprob: float = 0.0) -> Event:
        """Let the request's watcher see it; the event of it."""
        if request.watch is not None:
            try:
                request.watch()
            except Exception as e:
                request.fail(e)
        if request.stop_token is not None:
            token = None
        score = logprob if request.logprobs and token is not None else None
        return Event(request.id, token, score, request.finish_reason)
