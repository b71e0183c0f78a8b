"""What a part of `benchmarks.gpu` measures, written to a file as it comes. Measures nothing."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.sizes import Sizes
from benchmarks.report import Better, Figure


class Run:
    """A part's process: where it runs, how much, until when, and where results go.

    Args:
        path: a file to which a JSON object is appended a line: {"figure": ...}, {"note": ...},
            {"failed": ...}.
        deadline: `time.time()` at which the process will be ended.
    """

    def __init__(self, path: Path, device: torch.device, sizes: Sizes, deadline: float):
        self.path, self.device, self.sizes, self.deadline = path, device, sizes, deadline

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.deadline - time.time()

    def _write(self, **entry: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(entry) + "\n")

    def figure(
        self, row: str, column: str, unit: str, runs: Sequence[float], better: Better = None
    ) -> None:
        """Keep a figure; see `Figure`."""
        figure = Figure(row, column, unit, list(runs), better=better)
        self._write(figure=asdict(figure) | {"median": figure.median})

    def peak_memory(self, row: str) -> None:
        """Keep the most memory that torch had allocated on a GPU; nothing on other devices."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
            self.figure(row, "peak memory", "GiB", [peak], "lower")

    def note(self, text: str) -> None:
        """Keep a line for the reader."""
        self._write(note=text)

    def failed(self, what: str, why: str) -> None:
        """Keep why something was not measured."""
        self._write(failed=f"{what}: {why}" if what else why)

    def attempt(
        self, what: str, function: Callable[..., Any], *args: Any, least: float = 3.0
    ) -> Any:
        """`function(*args)`; None, and a line that says why, if it fails or no time is left.

        Args:
            least: seconds that it needs.
        """
        if self.left < least:
            self.failed(what, f"not begun: {self.left:.0f} s are left, and it needs {least:.0f} s")
            return None
        try:
            return function(*args)
        except Exception as e:
            traceback.print_exc()
            why = reason(e)
        gc.collect()  # what the failed function had allocated
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.failed(what, why)
        return None


def reason(error: BaseException) -> str:
    """An exception as one line."""
    text = str(error).strip()
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory: " + text.partition(". ")[2].partition(". ")[0]
    lines = text.splitlines() or [""]
    return f"{type(error).__name__}: {lines[0 if len(lines[-1]) < 8 else -1]}"[:300]


def read_entries(path: Path) -> list[dict[str, Any]]:
    """What a `Run` wrote; a line that was cut off at the end is left out."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries
