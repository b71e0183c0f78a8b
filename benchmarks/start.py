"""Seconds from `llama3 complete` to the first character and to the end, with the demo model.

    python -m benchmarks.start
    python -m benchmarks.start --runs 9 --out start.json

A run that does not count comes first: it compiles the kernels and reads the files into memory.
Importing torch alone is measured in the same rounds. Prints a table and one JSON line.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.flags import check_counts, check_file
from benchmarks.report import Figure, finish, make_result
from benchmarks.script import run_benchmark

PROMPT = ["complete", "The capital of France is", "--temperature", "0"]
COMMANDS = {
    "llama3 complete": ["-m", "llama", *PROMPT],
    "import torch": ["-c", "import torch; print(1, flush=True)"],
}


def seconds(command: list[str]) -> tuple[float, float]:
    """(until the first byte of stdout, until the end).

    Raises:
        RuntimeError: the command failed.
    """
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        first = time.perf_counter() - start
        process.stdout.read()
        if process.wait():
            raise RuntimeError(f"`python {' '.join(command)}` failed; run it to see why")
    return first, time.perf_counter() - start


def main(new: int = 8, runs: int = 5, out: str | None = None) -> None:
    """Measure and print.

    Args:
        new: tokens of the completion.
        runs: of which the median counts.
        out: a JSON file to write.
    """
    check_counts(new=new, runs=runs)
    check_file("out", out, ".json")
    commands = COMMANDS | {"llama3 complete": [*COMMANDS["llama3 complete"], "-n", str(new)]}
    first: dict[str, list[float]] = {row: [] for row in commands}
    end: dict[str, list[float]] = {row: [] for row in commands}
    for i in range(runs + 1):
        for row, command in commands.items():
            times = seconds(command)
            if i > 0:
                first[row].append(times[0])
                end[row].append(times[1])
    figures = []
    for row in commands:
        figures.append(Figure(row, "first character", "s", first[row], better="lower"))
        figures.append(Figure(row, "end", "s", end[row], better="lower"))
    finish(make_result("start", {"new": new, "runs": runs}, figures), out)


if __name__ == "__main__":
    run_benchmark(main, "start")
