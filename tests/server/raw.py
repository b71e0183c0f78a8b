"""Clients that a library does not offer: slow, rude, or with malformed requests."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import Any

from tests.server.running import RunningServer


def connect(server: RunningServer) -> socket.socket:
    """A connection, to be closed by the caller."""
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


def post(path: str, body: bytes | dict[str, Any], *headers: str) -> bytes:
    """The bytes of a request; `headers` come after those that it needs."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(data)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + data


def read_all(sock: socket.socket) -> bytes:
    """What the server sends until it closes, or resets a connection on which more was sent."""
    found = b""
    with suppress(ConnectionResetError):
        while part := sock.recv(65_536):
            found += part
    return found
