"""SIGINT and SIGTERM, recorded instead of raised, so that a loop can finish its step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from llama.distributed import job


class DeferredSignals:
    """A block in which SIGINT and SIGTERM are recorded and do not interrupt.

    In a single process a second signal raises KeyboardInterrupt. Under torchrun it does not: a rank
    may receive both the terminal's signal and the launcher's.

    Attributes:
        number: the number of the latest signal, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._handlers: dict[int, Any] = {}  # those to restore

    def __enter__(self) -> DeferredSignals:
        if threading.current_thread() is threading.main_thread():  # other threads cannot set any
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and not job.is_launched():
            raise KeyboardInterrupt
        self.number = number
