"""A client of OpenAI-compatible servers that costs little: bytes are kept, and parsed afterwards.

Client and server share the processors, so a client that parses each event while it waits takes its
time from the server. This one notes when bytes arrived. Knows HTTP/1.1 as far as these servers
speak it, and nothing about models.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

LAST_CHUNK = b"0\r\n\r\n"
HOST = "127.0.0.1"


@dataclass
class Reply:
    """What a server sent for one request.

    Attributes:
        sent: when the request was written; monotonic seconds, as all times.
        received: (time, bytes) of each arrival.
        whole: it was received to its end.
    """

    sent: float
    received: list[tuple[float, bytes]] = field(default_factory=list)
    whole: bool = False

    @property
    def status(self) -> int:
        """The status; 0 if nothing was received."""
        head = b"".join(data for _, data in self.received)
        return int(head[9:12]) if len(head) >= 12 else 0

    @property
    def seconds(self) -> float:
        return self.received[-1][0] - self.sent

    def body(self) -> bytes:
        """The body of a reply that is not a stream."""
        head, body = split_head(b"".join(data for _, data in self.received))
        return take_chunks(body)[0] if head is not None and is_chunked(head) else body

    def events(self) -> list[tuple[float, dict[str, Any]]]:
        """(time, JSON) of each server-sent event.

        Raises:
            ValueError: the reply is no whole stream.
        """
        if self.status != 200 or not self.whole:
            raise ValueError(f"no whole stream, status {self.status}: {self.body()[:500]!r}")
        events, raw, text = [], b"", b""
        head = None
        for when, data in self.received:
            raw += data
            if head is None:
                head, raw = split_head(raw)
            if head is None:
                continue
            content, raw = take_chunks(raw) if is_chunked(head) else (raw, b"")
            *done, text = (text + content).split(b"\n\n")
            for event in done:
                if event.startswith(b"data: {"):
                    events.append((when, json.loads(event[6:])))
        return events


def split_head(data: bytes) -> tuple[bytes | None, bytes]:
    """(head, what follows it); (None, `data`) while the head is not whole."""
    head, end, rest = data.partition(b"\r\n\r\n")
    return (head, rest) if end else (None, data)


def is_chunked(head: bytes) -> bool:
    return b"transfer-encoding: chunked" in head.lower()


def take_chunks(data: bytes) -> tuple[bytes, bytes]:
    """(content of the whole chunks at the beginning of a chunked body, the rest)."""
    content = b""
    while True:
        size, end, rest = data.partition(b"\r\n")
        if not end or len(rest) < int(size, 16) + 2:
            return content, data
        n = int(size, 16)
        content, data = content + rest[:n], rest[n + 2 :]


class Connection(asyncio.Protocol):
    """A connection that carries one request after another."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.reply: Reply | None = None
        self.ended: asyncio.Future[None] | None = None
        self.length: int | None = None  # bytes of head and body; None if chunked or not known yet
        self.size = 0  # bytes received
        self.tail = b""  # the last bytes of the body
        self.used = False  # has carried a reply

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.reply is None:
            return
        self.reply.received.append((time.monotonic(), data))
        self.size += len(data)
        if self.size == len(data):  # the first bytes: the head
            self.length = content_end(data)
            data, self.tail = split_head(data)[1], b""
        self.tail = (self.tail + data)[-len(LAST_CHUNK) :]
        if self.size == self.length if self.length is not None else self.tail == LAST_CHUNK:
            self._end(whole=True)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._end(whole=False)

    def _end(self, whole: bool) -> None:
        if self.reply is not None and self.ended is not None and not self.ended.done():
            self.reply.whole = whole
            self.ended.set_result(None)
        self.reply = None

    def begin(self, port: int, method: str, path: str, body: object = None) -> Reply:
        """Send a request; the reply fills while `ended` waits."""
        assert self.transport is not None, "the connection is closed"
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: {HOST}:{port}\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        self.size, self.length = 0, None
        self.ended = asyncio.get_running_loop().create_future()
        self.reply = reply = Reply(time.monotonic())
        self.transport.write(head.encode() + b"\r\n" + content)
        return reply

    def abort(self) -> None:
        """Disconnect at once."""
        if self.transport is not None:
            self.transport.abort()


def content_end(data: bytes) -> int | None:
    """Bytes of head and body, from the Content-Length of the first bytes; None if they lack it."""
    head, rest = split_head(data)
    for line in (head or b"").lower().split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"content-length":
            return len(data) - len(rest) + int(value)
    return None


class Client:
    """Sends requests to a server on a port of this machine.

    Attributes:
        repeated: requests sent again, because the server had closed the connection of an earlier.
    """

    def __init__(self, port: int):
        self.port = port
        self.repeated = 0
        self._idle: list[Connection] = []

    async def request(self, method: str, path: str, body: object = None) -> Reply:
        """Send a request and wait for the whole reply, or for the end of the connection."""
        connection = await self.connect()
        reply = connection.begin(self.port, method, path, body)
        assert connection.ended is not None
        await connection.ended
        if not reply.received and connection.used:
            self.repeated += 1
            return await self.request(method, path, body)
        connection.used = True
        if connection.transport is not None:
            self._idle.append(connection)
        return reply

    async def connect(self) -> Connection:
        """A connection that carries no request now."""
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None:
                return connection
        loop = asyncio.get_running_loop()
        return (await loop.create_connection(Connection, HOST, self.port))[1]

    async def request_and_leave(self, path: str, body: object, seconds: float) -> Reply:
        """Send a request and disconnect after a time, unless the reply has ended."""
        connection = await self.connect()
        reply = connection.begin(self.port, "POST", path, body)
        assert connection.ended is not None
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(connection.ended), seconds)
        connection.abort()
        return reply

    def close(self) -> None:
        while self._idle:
            self._idle.pop().abort()


def completion_body(model: str, prompt: Sequence[int], new: int) -> dict[str, Any]:
    """A greedy stream of exactly `new` tokens, with its usage at the end."""
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": new,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def text_times(events: Sequence[tuple[float, dict[str, Any]]]) -> list[float]:
    """When text arrived."""
    times = []
    for when, event in events:
        for choice in event.get("choices", []):
            if choice.get("text") or choice.get("delta", {}).get("content"):
                times.append(when)
    return times


def generated_tokens(events: Sequence[tuple[float, dict[str, Any]]]) -> int:
    """The tokens that the stream's usage counts."""
    for _, event in reversed(events):
        if event.get("usage"):
            return int(event["usage"]["completion_tokens"])
    raise ValueError("the stream ended without usage")
