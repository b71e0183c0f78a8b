"""Opens torch's TCP key-value store within a time. Knows nothing about ranks."""

from __future__ import annotations

import socket
import threading
from datetime import timedelta

import torch.distributed as dist

GRACE = 1.0  # seconds beyond the timeout in which torch reports a failure by itself


def open_store(host: str, port: int, world: int, serves: bool, timeout: timedelta) -> dist.TCPStore:
    """The store at `host`:`port`, served by this process or by another one.

    torch waits without limit for an answer of whoever listens there, and meanwhile delays signal
    handlers; so it waits in a thread.

    Raises:
        TimeoutError: something listens there and does not answer.
        RuntimeError: torch's error: the port is in use, nothing listens, or the answer is wrong.
    """
    found: list[dist.TCPStore | Exception] = []

    def open_it() -> None:
        try:
            found.append(dist.TCPStore(host, port, world, serves, timeout, wait_for_workers=False))
        except Exception as e:
            found.append(e)

    thread = threading.Thread(target=open_it, daemon=True)  # does not keep the process from ending
    thread.start()
    thread.join(min(timeout.total_seconds() + GRACE, threading.TIMEOUT_MAX))
    if not found:
        if not _listens(host, port):  # torch's own report may come late on a busy machine
            raise RuntimeError(f"nothing listens at {host}:{port}")
        raise TimeoutError(
            f"what listens at {host}:{port} does not answer within {timeout.total_seconds():g} s"
        )
    [result] = found
    if isinstance(result, Exception):
        raise result
    return result


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=GRACE):
            return True
    except OSError:
        return False
