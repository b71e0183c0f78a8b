"""What clients of a server measure: throughput, first tokens, gaps, /health, abandoned requests.

`ServerClients` works in a process of its own (`benchmarks.workers`). Knows no model: prompts are
ids. Every request is greedy and generates a given number of tokens.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from benchmarks.http_client import (
    Client,
    Reply,
    completion_body,
    generated_tokens,
    text_times,
)

PATH = "/v1/completions"
HEALTH_PAUSE = 0.02  # seconds between two requests of /health
Prompts = Sequence[Sequence[int]]


class ServerClients:
    """Clients of the server at a port."""

    def __init__(self, port: int):
        self.port = port
        self.model = ""

    def throughput(
        self, prompts: Prompts, new: int, streams: int, health: bool = False
    ) -> dict[str, Any]:
        """Send all prompts, `streams` at a time.

        Args:
            health: also ask /health again and again, on a connection of its own.

        Returns:
            rate (tokens per second), first (seconds to each request's first text), gaps (seconds
            between texts), cpu (seconds of this process per second), health (seconds of each).
        """
        return asyncio.run(self._throughput(prompts, new, streams, health))

    def beside_prefill(self, prompts: Prompts, long: Sequence[int], new: int) -> dict[str, Any]:
        """Send a long prompt while `prompts` decode.

        Returns:
            gaps of the decoding streams while the long prompt is computed, and its first (seconds).
        """
        return asyncio.run(self._beside_prefill(prompts, long, new))

    async def _throughput(
        self, prompts: Prompts, new: int, streams: int, health: bool
    ) -> dict[str, Any]:
        client = Client(self.port)
        model = await self._name(client)
        bodies = iter([completion_body(model, prompt, new) for prompt in prompts])
        replies: list[Reply] = []

        async def stream() -> None:
            for body in bodies:
                replies.append(await client.request("POST", PATH, body))

        latencies: list[float] = []
        asking = asyncio.create_task(ask_health(self.port, latencies)) if health else None
        start, cpu = time.monotonic(), time.process_time()
        await asyncio.gather(*(stream() for _ in range(streams)))
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu
        if asking is not None:
            asking.cancel()
        client.close()
        found = [reply.events() for reply in replies]
        counts = [generated_tokens(events) for events in found]
        if counts != [new] * len(prompts):
            raise ValueError(f"the server generated {counts} tokens instead of {new} each")
        times = [text_times(events) for events in found]
        return {
            "rate": sum(counts) / seconds,
            "first": [t[0] - reply.sent for t, reply in zip(times, replies, strict=True)],
            "gaps": [after - before for each in times for before, after in pairwise(each)],
            "cpu": cpu / seconds,
            "health": latencies,
        }

    async def _beside_prefill(
        self, prompts: Prompts, long: Sequence[int], new: int
    ) -> dict[str, Any]:
        client = Client(self.port)
        model = await self._name(client)
        replies = []
        for prompt in prompts:
            connection = await client.connect()
            body = completion_body(model, prompt, new)
            replies.append((connection, connection.begin(self.port, "POST", PATH, body)))
        while not all(len(reply.received) > 4 for _, reply in replies):
            await asyncio.sleep(0.01)
        body = completion_body(model, long, 1)
        last = await client.request("POST", PATH, body)
        end = last.received[-1][0]
        while not all(reply.whole or reply.received[-1][0] > end for _, reply in replies):
            await asyncio.sleep(0.01)
        for connection, _ in replies:
            connection.abort()
        client.close()
        first = text_times(last.events())[0]
        gaps = []
        for _, reply in replies:
            times = [when for when, _ in reply.received]
            gaps += [b - a for a, b in pairwise(times) if b > last.sent and a < first]
        return {"gaps": gaps, "first": [first - last.sent]}

    async def _name(self, client: Client) -> str:
        """The model's name, which the server tells."""
        if not self.model:
            reply = await client.request("GET", "/v1/models")
            self.model = json.loads(reply.body())["data"][0]["id"]
        return self.model


async def ask_health(port: int, latencies: list[float]) -> None:
    """Ask for /health until cancelled; the seconds of each reply go to `latencies`."""
    client = Client(port)
    try:
        while True:
            reply = await client.request("GET", "/health")
            if reply.status != 200:
                raise ValueError(f"/health answered {reply.status}")
            latencies.append(reply.seconds)
            await asyncio.sleep(HEALTH_PAUSE)
    finally:
        client.close()
