"""A process of its own for each system that is measured. Knows no system.

So its memory is its own; and it is stopped while another is measured, because the threads of an
idle one may spin (OMP_WAIT_POLICY=ACTIVE) and take the others' cores.
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
    """An object in another process, which runs only during the calls of its methods.

    Args:
        name: for messages.
        make: what makes the object, importable.
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
        self.connection.close()  # ends it, unless it is busy
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGCONT)
        self.process.join(5)
        self.process.kill()
        self.process.join()

    def call(self, method: str, *args: Any) -> Any:
        """What the object's method returns.

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
                "-9 is mostly a lack of memory: take a smaller shape or fewer peers"
            ) from None
        if failed:
            raise RuntimeError(f"{self.name}: {result}")
        os.kill(self.process.pid, signal.SIGSTOP)
        return result


def _serve(
    connection: Connection, threads: int, make: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """Make the object at the first call; until then nothing is computed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent will end this process
    os.dup2(2, 1)  # what libraries print is no part of the table
    torch.set_num_threads(threads)
    found = None
    while True:
        try:
            method, values = connection.recv()
        except EOFError:
            return
        try:
            found = make(*args) if found is None else found
            connection.send((False, getattr(found, method)(*values)))
        except Exception as e:
            traceback.print_exc()
            connection.send((True, f"{type(e).__name__}: {e}"))


class Reader:
    """Reads memory and does nothing else: the bandwidth that the systems are held against."""

    def __init__(self, size: int):
        self.data = torch.ones(size // 4, device=pick_device(None))

    def read(self) -> float:
        """Bytes a second: the median of five sums."""
        times = []
        for _ in range(5):
            start = time.perf_counter()
            self.data.sum().item()
            times.append(time.perf_counter() - start)
        return self.data.nbytes / statistics.median(times)
