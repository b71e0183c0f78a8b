"""From a checked body to its reply, whole or as server-sent events. Knows no URL.

A client that goes away, at any moment, ends its request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llama.common.errors import GrammarError, QueueFull
from llama.engine.request import Request
from llama.generation import Answer, Piece
from llama.server.common_body import CommonBody
from llama.server.errors import ApiError, error_object, unavailable
from llama.server.guard import DisconnectError, Receive, Send, send_bytes
from llama.server.replies import DONE, event, to_json
from llama.server.threads import Threads
from llama.server.ticket import Ticket
from llama.server.worker import UnavailableError, Worker

log = logging.getLogger("llama")
QUICK_SCORES = 200  # log-probabilities that are written in the event loop
BEAT = 15.0  # seconds after which a waiting client gets a comment: proxies end silent connections
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Reply(Protocol):
    """See `llama.server.replies`."""

    def first(self) -> list[dict[str, Any]]: ...
    def piece(self, index: int, answer: Answer, piece: Piece) -> list[dict[str, Any]]: ...
    def end(self) -> list[dict[str, Any]]: ...
    def whole(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Prepared:
    """A request that is ready to be queued."""

    body: CommonBody
    groups: Sequence[Sequence[Request]]
    reply: Reply


@contextlib.asynccontextmanager
async def watched(receive: Receive) -> AsyncIterator[Callable[[], None]]:
    """A block that a disconnection ends with DisconnectError. The body has been read.

    Yields a check that raises it too: `asyncio.wait_for` may return in spite of a cancellation.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    def check() -> None:
        if gone:
            raise DisconnectError

    watcher = asyncio.create_task(watch())
    try:
        yield check
    except asyncio.CancelledError:
        check()
        raise
    finally:
        watcher.cancel()


async def respond(
    prepared: Prepared, worker: Worker, threads: Threads, send: Send, *, time_limit: float
) -> None:
    """Run a request and send its reply.

    Args:
        threads: build the parts of the reply that take long.
        time_limit: seconds for the answers.

    Raises:
        ApiError: nothing has been sent yet.
    """
    stream = prepared.body.stream
    with submitted(prepared, worker, time_limit) as ticket:
        builder = _Builder(prepared.reply, ticket, threads)
        await (_stream if stream else _whole)(builder, send)


@contextlib.contextmanager
def submitted(prepared: Prepared, worker: Worker, time_limit: float) -> Iterator[Ticket]:
    """A ticket, closed at the end of the block. Errors leave it as `as_api_error` has them."""
    body = prepared.body
    try:
        try:
            ticket = worker.submit(prepared.groups, body.stop, time_limit, whole=not body.stream)
        except (TypeError, ValueError) as e:
            raise ApiError(400, str(e)) from None
        try:
            yield ticket
        finally:
            ticket.close()
    except Exception as e:
        raise as_api_error(e) from e


def as_api_error(error: Exception) -> Exception:
    """What a failure of the worker is to the client."""
    if isinstance(error, QueueFull):
        return unavailable("too many requests wait already; try again later", "queue_full", 2)
    if isinstance(error, UnavailableError):
        return unavailable(str(error), "unavailable", 5)
    if isinstance(error, ApiError | DisconnectError):
        return error
    if isinstance(error, GrammarError):
        return ApiError(400, f"{error}; use a simpler schema")
    # Its message may quote a text; only these cannot.
    cause = f": {error}" if isinstance(error, MemoryError | torch.OutOfMemoryError) else ""
    log.error("An answer failed: %s%s", type(error).__name__, cause)
    return ApiError(
        500,
        "the answer failed, the server goes on; its log says how",
        type="server_error",
        headers={"x-should-retry": "false"},
    )


def timed_out() -> ApiError:
    """A 504. The same request would take as long again."""
    return ApiError(
        504,
        "the answer took longer than the server's --request_timeout; ask for fewer tokens",
        type="server_error",
        code="timeout",
        headers={"x-should-retry": "false"},
    )


@dataclass(frozen=True)
class _Builder:
    """Makes the chunks of a reply from the pieces of a ticket."""

    reply: Reply
    ticket: Ticket
    threads: Threads

    async def chunks(self, pieces: Sequence[tuple[int, Piece]]) -> list[dict[str, Any]]:
        if any(piece.finish_reason == "timeout" for _, piece in pieces):
            raise timed_out()
        if self._scored(pieces) <= QUICK_SCORES:
            return self._build(pieces)
        return await self.threads.run(lambda: self._build(pieces), None)

    def _build(self, pieces: Sequence[tuple[int, Piece]]) -> list[dict[str, Any]]:
        answers = self.ticket.answers
        return [chunk for i, piece in pieces for chunk in self.reply.piece(i, answers[i], piece)]

    def _scored(self, pieces: Sequence[tuple[int, Piece]]) -> int:
        """At most how many tokens get log-probabilities, with `echo` also those of prompts."""
        count = 0
        for index, piece in pieces:
            request = self.ticket.answers[index].generation.request
            count += len(piece.logprobs)
            count += 0 if request.score_from is None else len(request.prompt)
        return count


async def _whole(builder: _Builder, send: Send) -> None:
    reply = builder.reply
    reply.first()
    async for pieces in builder.ticket.batches():
        await builder.chunks(pieces)
    reply.end()
    await send_json(reply.whole(), send)


async def _stream(builder: _Builder, send: Send) -> None:
    """Send chunks. The head waits for the first of them, so that an error can have a status."""
    reply, begun = builder.reply, False

    async def write(data: bytes, more: bool = True) -> None:
        nonlocal begun
        if not begun:
            start = {"type": "http.response.start", "status": 200, "headers": [*STREAM_HEADERS]}
            begun, data = True, b"".join(map(event, reply.first())) + data
            await send(start)
        await send({"type": "http.response.body", "body": data, "more_body": more})

    try:
        async for pieces in builder.ticket.batches(BEAT):
            if not pieces:
                await write(b": the answer is not ready yet\n\n")
            elif chunks := await builder.chunks(pieces):
                await write(b"".join(map(event, chunks)))
        await write(b"".join(map(event, reply.end())) + DONE, more=False)
    except Exception as e:
        error = as_api_error(e)
        if not begun or not isinstance(error, ApiError):
            raise
        await write(event(error_object(error)), more=False)


async def send_json(value: Any, send: Send, status: int = 200) -> None:
    """Send JSON."""
    await send_bytes(to_json(value), send, status)
