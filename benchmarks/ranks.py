"""Decoding on several CPU ranks of one thread each, beside one rank of as many threads.

    python -m benchmarks.ranks --shape 1b
    python -m benchmarks.ranks --shape 135m --ranks 3 --new 64

Both jobs load the same random weights and run alternately. Prints a table and one JSON line, which
--out saves.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from contextlib import suppress
from typing import Any

import torch

from benchmarks.flags import check_counts, check_file, check_model
from benchmarks.ours import build, random_prompts
from benchmarks.peers import Ours
from benchmarks.random_checkpoint import SHAPES, RandomSource
from benchmarks.report import Figure, finish, make_result
from benchmarks.script import run_benchmark
from llama.distributed import job, tensor_parallel


def worker(shape: str, dtype: str, prompt: int, new: int) -> None:
    """One rank: generate once for each line of stdin; rank 0 prints times and ids as JSON."""
    tensor_parallel.initialize(None, torch.device("cpu"))
    engine = build(RandomSource(SHAPES[shape]), 1, prompt + new, dtype, device="cpu")
    system, prompts = Ours(engine), random_prompts(SHAPES[shape]["vocab_size"], [prompt])
    while tensor_parallel.broadcast_json(sys.stdin.readline() if job.is_leader() else None):
        ids, first, others = system.generate(prompts, new)
        result = {"first_token_s": first, "step_s": others / (new - 1), "ids": ids[0]}
        if job.is_leader():
            print(json.dumps(result), flush=True)


class RankJob:
    """The processes of some ranks, each running `worker`, and their measured runs."""

    def __init__(self, ranks: int, threads: int, arguments: list[str]):
        command = [sys.executable, "-m"]
        if ranks > 1:
            command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
        self.title = f"{ranks} rank{'s' * (ranks > 1)} x {threads} thread{'s' * (threads > 1)}"
        self.runs: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [*command, "benchmarks.ranks", "worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )

    def run(self) -> dict[str, Any]:
        """Generate once.

        Raises:
            RuntimeError: a rank failed.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):  # then there is no line either
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a rank failed; its message is above")
        result: dict[str, Any] = json.loads(line)
        return result

    def end(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def figures(self) -> list[Figure]:
        first = [run["first_token_s"] for run in self.runs]
        speeds = [1 / run["step_s"] for run in self.runs]
        return [
            Figure(self.title, "first token", "s", first, better="lower"),
            Figure(self.title, "decode", "tok/s", speeds, better="higher"),
        ]


def main(
    shape: str = "1b",
    ranks: int = 2,
    dtype: str = "bfloat16",
    prompt: int = 64,
    new: int = 32,
    runs: int = 5,
    out: str | None = None,
) -> None:
    """Measure and print.

    Args:
        ranks: of the second job, and threads of the first.
        prompt: tokens of the prompt.
        new: tokens that follow it.
        runs: rounds of which the median counts.
        out: a JSON file to write.
    """
    check_model(shape, dtype)
    check_counts(ranks=ranks, prompt=prompt, new=new, runs=runs)
    check_file("out", out, ".json")
    arguments = [shape, dtype, str(prompt), str(new)]
    one, several = RankJob(1, ranks, arguments), RankJob(ranks, 1, arguments)
    try:
        warm = [each.run() for each in (one, several)]
        for _ in range(runs):
            for each in (one, several):
                each.runs.append(each.run())
    finally:
        one.end()
        several.end()
    steps = [statistics.median(run["step_s"] for run in each.runs) for each in (one, several)]
    same = warm[0]["ids"][0] == warm[1]["ids"][0]
    figures = [
        *one.figures(),
        *several.figures(),
        Figure(f"{ranks} ranks / 1 rank", "decode", "", [steps[0] / steps[1]], better="higher"),
        Figure("same first id (1 is yes)", "decode", "", [int(same)], better="higher"),
    ]
    settings = {"shape": shape, "ranks": ranks, "dtype": dtype, "prompt": prompt, "new": new}
    finish(make_result(f"ranks {shape}", settings | {"runs": runs}, figures), out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        run_benchmark(main, "ranks")
