"""Measures one checkout of this repository; `benchmarks.checkouts` runs it as a script.

Uses only `Llama.build` and `Llama.generate`, which every version has, and imports nothing else of
the repository. Its argument is a JSON object, see `Task`. Prints one line of JSON at the end.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_SEQ_LEN = 640


@dataclass(frozen=True)
class Task:
    """What to measure.

    Attributes:
        ckpt_dir, tokenizer_path, quantize: of `Llama.build`.
        dtype: torch's name, such as "bfloat16".
        vocab_size: upper bound of the random prompt ids.
        prefill: lengths of the prompts to prefill.
        prompt, new: length of the prompt to decode after, and how many ids to decode.
        repeats: of each measurement.
    """

    ckpt_dir: str
    tokenizer_path: str
    dtype: str
    quantize: str | None
    vocab_size: int
    prefill: list[int]
    prompt: int
    new: int
    repeats: int


def status_bytes(kind: str) -> int | None:
    """A field of /proc/self/status in bytes, or None off Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{kind}:"):
            return int(line.split()[1]) * 1024
    return None


class PeakAnonymous:
    """Highest memory that no file backs, sampled every 5 ms during the block; None off Linux."""

    def __init__(self) -> None:
        self.peak = status_bytes("RssAnon")
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while self.peak is not None and not self.done.wait(0.005):
            self.peak = max(self.peak, status_bytes("RssAnon") or 0)

    def __enter__(self) -> PeakAnonymous:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


class Subject:
    """The model of this checkout, and a seeded prompt.

    Raises:
        RuntimeError: the `llama` package of another folder was imported.
    """

    def __init__(self, task: Task):
        import torch

        import llama

        folder = Path(llama.__file__).resolve().parents[1]
        if folder != Path.cwd().resolve():
            raise RuntimeError(f"imported the package in {folder}, not the one in {Path.cwd()}")
        rng = random.Random(0)
        longest = max(task.prompt, *task.prefill)
        self.prompt = [rng.randrange(task.vocab_size) for _ in range(longest)]
        self.ids: list[int] = []  # of the last answer
        build = llama.Llama.build
        known = getattr(sys.modules.get("llama.generation"), "BuildOptions", None)
        plain: dict[str, Any] = {"speculate": False} if hasattr(known, "speculate") else {}
        start = time.perf_counter()
        self.model = build(
            task.ckpt_dir,
            task.tokenizer_path,
            MAX_SEQ_LEN,
            1,
            dtype=getattr(torch, task.dtype),
            quantize=task.quantize,
            **plain,
        )
        self.build_s = time.perf_counter() - start

    def seconds(self, length: int, new: int) -> float:
        """Time to generate `new` ids after the first `length` ids of the prompt.

        Raises:
            RuntimeError: the answer ended early.
        """
        start = time.perf_counter()
        [self.ids], _ = self.model.generate([self.prompt[:length]], new, temperature=0.0)
        taken = time.perf_counter() - start
        if len(self.ids) != new:
            raise RuntimeError(f"a stop token came after {len(self.ids)} ids; change --seed")
        return taken


def measure(task: Task) -> dict[str, Any]:
    """Build, warm up, then measure.

    Returns:
        build_s; prefill_s, {length: seconds of each repeat}; step_s, seconds of a decode step of
        each repeat; peak_GiB, {kind: resident memory}; ids of the decoded answer.
    """
    with PeakAnonymous() as anonymous:
        subject = Subject(task)
        for length in task.prefill:
            subject.seconds(length, 1)
        subject.seconds(task.prompt, task.new + 1)
    prefill: dict[int, list[float]] = {length: [] for length in task.prefill}
    steps = []
    for _ in range(task.repeats):
        for length, times in prefill.items():
            times.append(subject.seconds(length, 1))
        first = subject.seconds(task.prompt, 1)
        steps.append((subject.seconds(task.prompt, task.new + 1) - first) / task.new)
    peaks = {"resident": status_bytes("VmHWM"), "anonymous": anonymous.peak}
    return {
        "build_s": subject.build_s,
        "prefill_s": prefill,
        "step_s": steps,
        "peak_GiB": {kind: n / 2**30 for kind, n in peaks.items() if n is not None},
        "ids": subject.ids,
    }


if __name__ == "__main__":
    print(json.dumps(measure(Task(**json.loads(sys.argv[1])))), flush=True)
