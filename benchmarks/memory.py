"""Resident memory of this process, as Linux reports it in /proc. Knows no model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SAMPLE_SECONDS = 0.005


def resident_bytes(kind: str) -> int:
    """Resident memory in bytes.

    Args:
        kind: "RssAnon", "RssFile", "VmRSS", "VmHWM", ...; see proc(5).

    Raises:
        OSError: this system does not report it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"this kernel does not report {kind}")


def resident() -> int:
    """All resident memory, in bytes, pages of mapped files included."""
    return resident_bytes("VmRSS")


def high_water_mark() -> int:
    """The most resident memory so far, in bytes, or since `reset_high_water_mark`."""
    return resident_bytes("VmHWM")


def reset_high_water_mark() -> None:
    """Let `high_water_mark` begin anew at what is resident now; see proc(5), clear_refs."""
    Path("/proc/self/clear_refs").write_text("5")


def anonymous_bytes() -> int:
    """Resident memory that no file backs."""
    return resident_bytes("RssAnon")


@contextmanager
def peak_anonymous(result: dict[str, float]) -> Iterator[None]:
    """Sample `anonymous_bytes` during the block.

    Puts the highest sample, less the first, into `result["peak_GiB"]`.
    """
    start, done = anonymous_bytes(), threading.Event()
    peak = start

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        result["peak_GiB"] = (peak - start) / 2**30
