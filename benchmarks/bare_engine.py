"""The engine without a server, on the same requests as `server_clients`. Knows no HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from benchmarks.ours import make_requests
from llama import Llama


class BareEngine:
    """The engine of a checkpoint, with a KV cache of `rows` x `length` positions."""

    def __init__(self, ckpt_dir: str, rows: int, length: int):
        self.engine = Llama.build(ckpt_dir, None, length, rows, speculate=False).engine

    def ready(self) -> None:
        """Return when the weights are loaded."""

    def throughput(
        self, prompts: Sequence[Sequence[int]], new: int, streams: int
    ) -> dict[str, Any]:
        """Run all prompts, `streams` at a time; see `ServerClients.throughput`."""
        engine = self.engine
        waiting = iter(make_requests(prompts, new))
        queued: dict[int, float] = {}  # when each request was queued, by its id
        first: dict[int, float] = {}  # seconds to its first id
        start, tokens = time.monotonic(), 0
        for _, request in zip(range(streams), waiting, strict=False):
            queued[engine.add(request).id] = time.monotonic()
        while engine.busy:
            for event in engine.step():
                now = time.monotonic()
                tokens += event.token is not None
                first.setdefault(event.id, now - queued[event.id])
                following = next(waiting, None) if event.finish_reason else None
                if following is not None:
                    queued[engine.add(following).id] = now
        return {
            "rate": tokens / (time.monotonic() - start),
            "first": list(first.values()),
            "gaps": [],
            "cpu": 0.0,
            "health": [],
        }

    def beside_prefill(
        self, prompts: Sequence[Sequence[int]], long: Sequence[int], new: int
    ) -> dict[str, Any]:
        """See `ServerClients.beside_prefill`; each gap is a step, for all streams."""
        engine = self.engine
        for request in make_requests(prompts, new):
            engine.add(request)
        for _ in range(5):
            engine.step()
        times = [time.monotonic()]
        last = engine.add(make_requests([long], 1)[0])
        while last.finish_reason is None:
            engine.step()
            times.append(time.monotonic())
        for id in range(last.id - len(prompts), last.id):
            engine.cancel(id)
        engine.step()
        gaps = [after - before for before, after in pairwise(times)]
        return {"gaps": gaps, "first": [times[-1] - times[0]]}
