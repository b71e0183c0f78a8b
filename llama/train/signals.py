"""Ctrl-C and SIGTERM as a request to stop, for a loop that ends its step first."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from llama.distributed import job


class Stop:
    """A block in which the two signals are only noted.

    Alone, a second one interrupts as always. Under torchrun each rank may get several: the
    terminal's and the launcher's.

    Attributes:
        signal: the number of the first that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # others may not
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and not job.is_launched():
            raise KeyboardInterrupt
        self.signal = number
