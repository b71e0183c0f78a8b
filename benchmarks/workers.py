"""Runs each measured system in its own process. Knows no system.

Its memory can then be measured alone. A process is stopped while another is measured, because idle
threads may spin (OMP_WAIT_POLICY=ACTIVE) and occupy the cores.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from llama.distributed.device import pick_device


class Worker:
    """An object in another process, which runs only while one of its methods is called.

    Args:
        name: for messages.
        make: importable function or class that creates the object, from `args`.
    """

    def __init__(self, name: str, make: Callable[..., Any], *args: Any):
        context = multiprocessing.get_context("spawn")  # a fork would share torch's threads
        self.name = name
        self.connection, theirs = context.Pipe()
        threads = torch.get_num_threads()
        self.process = context.Process(target=_serve, args=(theirs, threads, make, args))
        self.process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.pid is not None
        self.connection.close()  # ends the process, unless it is busy
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGCONT)
        self.process.join(5)
        self.process.kill()
        self.process.join()

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the object.

        Raises:
            RuntimeError: it failed, or the process ended.
        """
        assert self.process.pid is not None
        try:
            os.kill(self.process.pid, signal.SIGCONT)
            self.connection.send((method, args))
            failed, result = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise RuntimeError(
                f"{self.name} ended with exit code {self.process.exitcode}; "
                "-9 usually means that memory ran out: use a smaller shape or fewer peers"
            ) from None
        if failed:
            raise RuntimeError(f"{self.name}: {result}")
        os.kill(self.process.pid, signal.SIGSTOP)
        return result


def _serve(
    connection: Connection, threads: int, make: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Answer calls until the connection closes. Creates the object at the first call."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    os.dup2(2, 1)  # stdout is for the results; libraries print to stderr instead
    torch.set_num_threads(threads)
    target = None
    while True:
        try:
            method, values = connection.recv()
        except EOFError:
            return
        try:
            target = make(*args) if target is None else target
            connection.send((False, getattr(target, method)(*values)))
        except Exception as e:
            traceback.print_exc()
            connection.send((True, f"{type(e).__name__}: {e}"))


class Reader:
    """Measures the bandwidth of reading memory, with which the systems are compared.

    Args:
        size: bytes of a tensor to sum.
    """

    def __init__(self, size: int):
        self.data = torch.ones(size // 4, device=pick_device(None))

    def read(self) -> float:
        """Bytes per second: the median of five sums."""
        times = []
        for _ in range(5):
            start = time.perf_counter()
            self.data.sum().item()
            times.append(time.perf_counter() - start)
        return self.data.nbytes / statistics.median(times)
