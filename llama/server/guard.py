"""Which requests are let in, and what every response carries. Pure ASGI; knows no endpoint.

Starlette's BaseHTTPMiddleware is not used: it would hide a client's disconnection from a stream.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from hashlib import sha256
from typing import Any

from llama.common.printable import printable_line
from llama.server.errors import ApiError, error_body
from llama.server.settings import MAX_BODY as MAX_BODY
from llama.server.settings import ServerSettings

log = logging.getLogger("llama")
Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Count = Callable[[str, int, float], None]

HOST = re.compile(r"(\[[0-9a-f:.]*\]|[^:\[\]]*)(?::\d*)?")  # name or address, port
NAMES = re.compile(rb"[\w-]+(?: ?, ?[\w-]+)*")  # of headers
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
PUBLIC = ("/", "/health", "/openapi.json", "/favicon.ico")  # need no key
GONE = 499  # status in the log of a request whose client went away before an answer began


class DisconnectError(Exception):
    """The client has disconnected: nobody reads a response."""


class Guard:
    """Checks the host and the key, in this order.

    Also adds a request id to each response, and writes the access log.
    """

    def __init__(self, app: App, settings: ServerSettings, count: Count):
        self.app, self.settings, self._count = app, settings, count
        key = settings.key
        self._key = None if key is None else sha256(key.encode()).digest()
        names = [*LOOPBACK, settings.host, *(settings.allowed_hosts or [])]
        self._hosts = {name.lower() for name in names}
        self._origins = {origin.encode() for origin in settings.cors_origin or []}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)  # lifespan; uvicorn runs without websockets
            return
        headers = dict(scope["headers"])
        request_id, start = secrets.token_hex(12), time.monotonic()
        scope.setdefault("state", {})["request_id"] = request_id
        more = [(b"x-request-id", request_id.encode()), *self._cors_headers(headers)]
        status = 0

        async def send_more(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *more]
            await send(message)

        try:
            self._check(scope, headers)
            if self._origins and is_preflight(scope["method"], headers):
                await send_preflight(headers, send_more)
            else:
                await self.app(scope, receive, send_more)
        except DisconnectError:
            status = status or GONE
        except Exception as e:
            error = self._as_api_error(e, request_id)
            if not status:
                await send_error(error, send_more)
        finally:
            seconds = time.monotonic() - start
            self._count(scope["path"], status, seconds)
            path = printable_line(scope["path"][:200])
            log.info("%s %s %s %.3f s %s", scope["method"], path, status, seconds, request_id)

    def _as_api_error(self, error: Exception, request_id: str) -> ApiError:
        """What the client is told. A bug is logged, without its message, which may quote texts."""
        if isinstance(error, ApiError):
            return error
        lines = "".join(traceback.format_tb(error.__traceback__))
        text = f": {error}" if self.settings.log_prompts else ""
        log.error("%s failed\n%s%s%s", request_id, lines, type(error).__name__, text)
        return ApiError(500, "the server failed; its log says how", type="server_error")

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Raise an ApiError for a request that is not to be answered."""
        if b"transfer-encoding" in headers and b"content-length" in headers:
            raise ApiError(  # a proxy might see another request in it (RFC 9112, 6.1)
                400,
                "a request has Content-Length or Transfer-Encoding, not both",
                headers={"Connection": "close"},
            )
        host = headers.get(b"host", b"").decode("latin-1")
        if "*" not in self._hosts and not self._is_known(host):
            raise ApiError(
                403,
                f"this server is not known as {host[:100]!r}; start it with --allowed_hosts NAME",
                type="permission_error",
                code="host_not_allowed",
            )
        if not is_preflight(scope["method"], headers) and not is_public(scope["path"]):
            self._check_key(headers.get(b"authorization", b""))

    def _is_known(self, host: str) -> bool:
        """Whether a Host header has an allowed name, or an address: no name server rebinds it."""
        found = HOST.fullmatch(host.lower())
        if found is None:
            return False
        return found[1].rstrip(".") in self._hosts or is_address(found[1].strip("[]"))

    def _check_key(self, authorization: bytes) -> None:
        """Raise a 401 unless there is no key, or this is "Bearer KEY"."""
        if self._key is None:
            return
        scheme, _, key = authorization.partition(b" ")
        right = hmac.compare_digest(sha256(key.strip()).digest(), self._key)
        if scheme.lower() != b"bearer" or not right:
            raise ApiError(
                401,
                "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                type="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _cors_headers(self, headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        """What lets a page of an allowed origin read the response."""
        origin = headers.get(b"origin", b"")
        if not self._origins:
            return []
        vary = (b"vary", b"Origin")
        if origin not in self._origins:
            return [vary]
        return [
            vary,
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", b"x-request-id, retry-after"),
        ]


def is_preflight(method: str, headers: dict[bytes, bytes]) -> bool:
    """Whether a browser asks if it may send a request. It cannot send the key with this."""
    return method == "OPTIONS" and b"access-control-request-method" in headers


def is_public(path: str) -> bool:
    """Whether a path needs no key."""
    return path in PUBLIC or path.startswith("/page/")


def is_address(name: str) -> bool:
    """Whether a host name is an IP address."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


async def send_preflight(headers: dict[bytes, bytes], send: Send) -> None:
    """The answer to a browser that asks whether it may send a request.

    With any headers: OpenAI's client sends a dozen of its own.
    """
    names = headers.get(b"access-control-request-headers", b"")
    allowed = names if NAMES.fullmatch(names) else b"authorization, content-type"
    answer = [
        (b"access-control-allow-methods", b"GET, POST"),
        (b"access-control-allow-headers", allowed),
        (b"access-control-max-age", b"600"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": answer})
    await send({"type": "http.response.body", "body": b""})


async def send_error(error: ApiError, send: Send) -> None:
    """Send an error's body."""
    more = [(k.lower().encode(), v.encode("latin-1")) for k, v in error.headers.items()]
    await send_bytes(error_body(error), send, error.status, headers=more)


async def send_bytes(
    body: bytes,
    send: Send,
    status: int = 200,
    kind: bytes = b"application/json",
    headers: Sequence[tuple[bytes, bytes]] = (),
) -> None:
    """Send a whole response; `kind` is its Content-Type."""
    head = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The JSON body of a request.

    Raises:
        ApiError: it is longer than `limit`, or has another type.
        DisconnectError: the client disconnected before its end.
    """
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":  # a page of another origin may send others without asking first
        raise ApiError(415, "send the header Content-Type: application/json")
    too_long = ApiError(413, f"the body is longer than {limit} bytes; send less")
    if int(headers.get(b"content-length", 0)) > limit:
        raise too_long
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise DisconnectError
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > limit:
            raise too_long
    return bytes(body)
