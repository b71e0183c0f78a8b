"""Several ranks that serve one model: rank 0 is asked, the others repeat what it does.

Before each step rank 0 broadcasts the requests that were added and cancelled since the last one.
Knows nothing about HTTP.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llama.common.errors import QueueFull
from llama.distributed import tensor_parallel
from llama.engine.engine import Engine
from llama.engine.metrics import EngineMetrics
from llama.engine.request import SHARED, Event, FinishReason, Generation, Request

BEAT = 2.0  # seconds between broadcasts where there is nothing to do: a lost rank is noticed then


class LeadingEngine:
    """The engine of rank 0, with the methods that a server needs, for any thread but `step`.

    Ids are given when a request is queued, in the order in which the engines will give them.
    """

    def __init__(self, engine: Engine, max_queue: int):
        self._engine, self._max_queue = engine, max_queue
        self._lock = threading.Lock()
        self._adds: list[Sequence[Generation]] = []
        self._cancels: list[tuple[int, FinishReason]] = []
        self._given = engine.metrics().requests  # ids so far

    def queue_siblings(self, generations: Sequence[Generation]) -> None:
        """As `Engine.queue_siblings`, from the next step on."""
        for generation in generations:
            self._engine.check(generation.request)
        with self._lock:
            now = self.metrics()
            left = now.running + now.waiting
            if left + len(generations) > now.slots + self._max_queue:
                raise QueueFull(f"{self._max_queue} requests wait already; try again later")
            for generation in generations:
                self._given += 1
                generation.id = self._given
            self._adds.append(generations)

    def cancel(self, id: int, reason: FinishReason = "cancelled") -> bool:
        """As `Engine.cancel`, before the next step."""
        with self._lock:
            self._cancels.append((id, reason))
        return True

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return bool(self._adds or self._cancels) or self._engine.busy

    def metrics(self) -> EngineMetrics:
        """As `Engine.metrics`; what no rank has yet waits."""
        # First: those that the engine begins meanwhile are counted twice, rather than not at all.
        new = sum(g.queued_at is None for group in list(self._adds) for g in group)
        found = self._engine.metrics()
        return replace(found, waiting=found.waiting + new)

    def step(self) -> list[Event]:
        """Tell the other ranks what is new, and step with them."""
        with self._lock:
            adds = list(self._adds)
            cancels, self._cancels = self._cancels, []
        shared = [[shared_fields(g.request) for g in group] for group in adds]
        tensor_parallel.broadcast_json([shared, cancels])
        replay(self._engine, adds, cancels)
        with self._lock:
            del self._adds[: len(adds)]  # the engine counts them now
        return self._engine.step() if self._engine.busy else []

    def end(self) -> None:
        """Let the other ranks return from `follow`."""
        tensor_parallel.broadcast_json(None)


def follow(engine: Engine) -> None:
    """Do what rank 0 does, until it ends."""
    while (news := tensor_parallel.broadcast_json(None)) is not None:
        shared, cancels = news
        adds = [[Generation(Request(**request)) for request in group] for group in shared]
        replay(engine, adds, cancels)
        if engine.busy:
            engine.step()


def replay(
    engine: Engine,
    adds: Sequence[Sequence[Generation]],
    cancels: Sequence[tuple[int, FinishReason]],
) -> None:
    """What every rank does between two steps."""
    for generations in adds:
        engine.queue_siblings(generations)
    for id, reason in cancels:
        engine.cancel(id, reason)


def shared_fields(request: Request) -> dict[str, Any]:
    """A request in JSON, as far as the other ranks need it: rank 0 draws for all."""
    values = {name: getattr(request, name) for name in SHARED}
    return values | {"stop_tokens": sorted(request.stop_tokens), "prompt": list(request.prompt)}


def lead(engine: Engine, max_queue: int) -> Engine | LeadingEngine:
    """What a server queues its requests in."""
    if tensor_parallel.size() > 1:
        return LeadingEngine(engine, max_queue)
    engine.max_queue = max_queue
    return engine
