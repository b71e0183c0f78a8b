"""How the server listens, whom it answers and for how long. Imports no model."""

from __future__ import annotations

import ipaddress
import math
import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from llama.common.options import option

KEY_VARIABLE = "LLAMA3_API_KEY"
MAX_BODY = 8 << 20  # bytes of a request's body
KEEP_ALIVE = 75  # seconds that an idle connection stays open; proxies reuse it for up to 60


@dataclass(frozen=True)
class ServerSettings:
    """Flags of `llama3 serve` that are about HTTP.

    Raises:
        ValueError: a value is out of range, or not of its form.
    """

    host: str = option(
        "127.0.0.1", "the address to listen on; 0.0.0.0 is every address of this machine"
    )
    port: int = option(8000, "the port to listen on; 0 takes a free one")
    api_key: str | None = option(
        None, f"the key that clients must send; the variable {KEY_VARIABLE} hides it from `ps`"
    )
    max_queue: int = option(256, "most requests that wait for a slot; more get a 503")
    allowed_hosts: list[str] | None = option(
        None, "a host name that clients may use for this server, or * for any; may be repeated"
    )
    cors_origin: list[str] | None = option(
        None, "a web origin, such as https://example.org, that may call; may be repeated"
    )
    model_name: str | None = option(
        None, "the name of the model in requests; by default that of its folder"
    )
    request_timeout: float = option(600.0, "seconds in which an answer must be complete")
    receive_timeout: float = option(60.0, "seconds in which a client must have sent its request")
    grace: float = option(20.0, "seconds for running requests to end after Ctrl-C or SIGTERM")
    log_prompts: bool = option(False, "write the bodies of requests to the log")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be 0 to 65535, not {self.port}")
        if self.max_queue < 1:
            raise ValueError(f"max_queue must be 1 or more, not {self.max_queue}")
        for name in ("request_timeout", "receive_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be seconds, more than 0")
        if not 0 <= self.grace < math.inf:
            raise ValueError("grace must be seconds, 0 or more")
        if self.model_name == "":
            raise ValueError("model_name must not be empty; leave it out for the folder's name")
        for origin in self.cors_origin or []:
            check_origin(origin)
        for host in self.allowed_hosts or []:
            if not re.fullmatch(r"\*|[\w.-]+|\[[0-9a-fA-F:.]+\]", host):
                raise ValueError(
                    f"allowed_hosts must be a host name without port or path, not {host!r}"
                )
        if self.api_key is not None:
            check_key(self.api_key, "api_key")

    @property
    def key(self) -> str | None:
        """The key of the flag, else of the environment; None: every client is answered.

        Raises:
            ValueError: the environment's cannot be sent in a header.
        """
        if self.api_key is None and KEY_VARIABLE in os.environ:
            check_key(os.environ[KEY_VARIABLE], KEY_VARIABLE)
            return os.environ[KEY_VARIABLE]
        return self.api_key

    @property
    def is_open_to_others(self) -> bool:
        """Whether other machines can connect, and need no key."""
        return not is_loopback(self.host) and self.key is None


def check_origin(origin: str) -> None:
    """Raise a ValueError for what a browser never sends as an Origin."""
    parts = urlsplit(origin)
    exact = f"{parts.scheme}://{parts.netloc}" == origin and "@" not in parts.netloc
    if not exact or parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(
            f"cors_origin must be an exact origin such as https://example.org, not {origin!r}"
        )


def check_key(key: str, name: str) -> None:
    """Raise a ValueError for a key that no client can send."""
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        raise ValueError(f"{name} must be printable ASCII without spaces at its ends")


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"
