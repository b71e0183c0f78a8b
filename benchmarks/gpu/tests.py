"""The tests marked `cuda`, by pytest in a process of its own: how many passed, which failed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

from benchmarks.gpu.record import Run

ROOT = Path(__file__).resolve().parents[2]
OUTCOME = re.compile(r"^(tests/\S+.*?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")
FAILURE = re.compile(r"^(?:FAILED|ERROR) (tests/\S+.*)")
TIME = re.compile(r"^ *([\d.]+s) (?:call|setup) +(tests/\S+.*)")


def run(run: Run) -> None:
    """Run them, and end them before the limit. Counts are kept in any case."""
    command = [sys.executable, "-u", "-m", "pytest", "tests/cuda", "-m", "cuda", "-v", "--tb=short"]
    command += ["-p", "no:cacheprovider", "--color=no", "-W", "ignore", *run.sizes.tests]
    # The CPU is the oracle: its kernels need not be compiled.
    environment = dict(os.environ) | {"COLUMNS": "300", "LLAMA3_KERNELS": "0"}
    environment.pop("TORCHDYNAMO_DISABLE", None)
    if run.device.type != "cuda":
        environment["LLAMA3_REHEARSE_CUDA"] = "1"
    output, code = run.path.with_suffix(".txt"), None
    with open(output, "w", encoding="utf-8") as f:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=f, stderr=subprocess.STDOUT
        )
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(max(1.0, run.left - 3))
        process.kill()
        process.wait()
    text = output.read_text(encoding="utf-8", errors="replace")
    counts, failures, slowest, last = parse(text)
    row = "pytest tests/cuda"
    for outcome in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
        if counts[outcome] or outcome in ("PASSED", "FAILED"):
            run.figure(row, outcome.lower(), "", [counts[outcome]])
    for line in failures:
        run.failed("", line)
    for line in slowest[:5]:
        run.note(f"slow: {line}")
    if code is None:
        run.failed(row, f"ended at its limit, after: {last}")
    elif code not in (0, 1):
        run.failed(row, f"pytest ended with exit code {code}, after: {last}")


def parse(output: str) -> tuple[Counter[str], list[str], list[str], str]:
    """(tests of each outcome, a line for each failure, the slowest tests, the last line)."""
    counts: Counter[str] = Counter()
    failures: dict[str, str] = {}
    slowest, last = [], "nothing was printed"
    for line in output.splitlines():
        last = line.strip() or last
        if match := OUTCOME.match(line):
            counts[match[2]] += 1
            if match[2] in ("FAILED", "ERROR"):
                failures[match[1]] = f"{match[1]} (no summary: pytest was ended)"
        elif match := FAILURE.match(line):
            failures[match[1].partition(" - ")[0]] = match[1][:300]
        elif match := TIME.match(line):
            slowest.append(f"{match[1]} {match[2]}")
    return counts, list(failures.values()), slowest, last
