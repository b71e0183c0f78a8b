"""HTTP connections with deadlines. Imports uvicorn.

uvicorn waits without limit for the rest of a request, and for a client that takes no more of a
response. Here the head and the body together have a number of seconds from the first byte on,
however slowly the bytes come, and a client that takes nothing is disconnected after a while.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama.server.errors import ApiError, error_body, unavailable

RECEIVED = (h11.DONE, h11.MUST_CLOSE, h11.CLOSED, h11.ERROR)  # states of a client


class TimedConnection(H11Protocol):
    """A connection with the options of uvicorn's and two more.

    Args:
        receive_timeout: seconds for a request.
        send_timeout: seconds in which a client must take something of what waits to be sent.
        most: connections at once; a further one gets a 503. Fewer than the files that a process
            may open: where those run out, no connection can even be refused.
    """

    def __init__(
        self, *args: Any, receive_timeout: float, send_timeout: float, most: int, **options: Any
    ):
        super().__init__(*args, **options)
        self._receive_timeout, self._send_timeout = receive_timeout, send_timeout
        self._most = most
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            self._send_error(unavailable("too many connections; try again later", "busy", 5))
            return
        # A connection on which nothing is sent is kept for as long as between two requests.
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def data_received(self, data: bytes) -> None:
        if self._deadline is None and self.conn.their_state not in RECEIVED:
            self._deadline = self.loop.call_later(self._receive_timeout, self._end_slow_client)
        super().data_received(data)
        if self._is_received():
            self._stop_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        if self._stalled is not None:
            self._stalled.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.call_later(self._send_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, in the form of all other errors."""
        self._send_error(ApiError(400, "this is not a valid HTTP request, or its head is too long"))

    def _is_received(self) -> bool:
        return self.conn.their_state in RECEIVED

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end_slow_client(self) -> None:
        self._deadline = None
        if self.transport.is_closing() or self._is_received():
            return
        seconds = f"{self._receive_timeout:g}"
        self._send_error(ApiError(408, f"the request was not complete after {seconds} seconds"))

    def _send_error(self, error: ApiError) -> None:
        """Send an error, unless a response has begun, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = error_body(error)
            headers = {"content-type": "application/json", "connection": "close"}
            headers |= {"content-length": str(len(body))} | error.headers
            for event in (
                h11.Response(status_code=error.status, headers=list(headers.items())),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
