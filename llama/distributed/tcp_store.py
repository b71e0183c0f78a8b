"""Opens torch's TCP key-value store within a time. Knows nothing about ranks."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import wait
from datetime import timedelta

import torch.distributed as dist

from llama.common.daemon_thread import call_in_daemon

GRACE = 1.0  # seconds beyond the timeout in which torch reports a failure by itself


def open_store(host: str, port: int, world: int, serves: bool, timeout: timedelta) -> dist.TCPStore:
    """The store at `host`:`port`, served by this process or by another one.

    torch waits without limit for an answer of whoever listens there, and meanwhile delays signal
    handlers; so it waits in a thread.

    Raises:
        TimeoutError: something listens there and does not answer.
        RuntimeError: torch's error: the port is in use, nothing listens, or the answer is wrong.
    """
    opening = call_in_daemon(
        lambda: dist.TCPStore(host, port, world, serves, timeout, wait_for_workers=False)
    )
    wait([opening], min(timeout.total_seconds() + GRACE, threading.TIMEOUT_MAX))
    if not opening.done():
        if not _listens(host, port):  # torch's own report may come late on a busy machine
            raise RuntimeError(f"nothing listens at {host}:{port}")
        raise TimeoutError(
            f"what listens at {host}:{port} does not answer within {timeout.total_seconds():g} s"
        )
    return opening.result()


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=GRACE):
            return True
    except OSError:
        return False
