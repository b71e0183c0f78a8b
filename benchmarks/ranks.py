"""Decoding on several CPU ranks of one thread each, beside one rank of as many threads.

    python -m benchmarks.ranks --shape 1b
    python -m benchmarks.ranks --shape 135m --ranks 3 --new 64

The same random weights; both jobs are loaded, and take turns. Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from typing import Any

import torch

from benchmarks.flags import check_counts, check_model
from benchmarks.generation import build, random_prompts
from benchmarks.peers import Ours
from benchmarks.random_checkpoint import SHAPES
from llama.checkpoints.load import tune
from llama.commands.script import run_script
from llama.distributed import job, tensor_parallel


def worker(shape: str, dtype: str, prompt: int, new: int) -> None:
    """One rank: generates whenever a line comes; the first rank tells how fast."""
    tensor_parallel.initialize(None, torch.device("cpu"))
    model = build(shape, 1, prompt + new, dtype, "cpu")
    tune(model, None, exact=False)
    system, prompts = Ours(model), random_prompts(SHAPES[shape]["vocab_size"], [prompt])
    while tensor_parallel.broadcast_json(sys.stdin.readline() if job.is_leader() else None):
        ids, first, others = system.generate(prompts, new)
        result = {"first_token_s": first, "step_s": others / (new - 1), "ids": ids[0]}
        if job.is_leader():
            print(json.dumps(result), flush=True)


class Job:
    """A worker on each of some ranks."""

    def __init__(self, ranks: int, threads: int, arguments: list[str]):
        command = [sys.executable, "-m"]
        if ranks > 1:
            command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
        self.runs: list[dict[str, Any]] = []
        self.process = subprocess.Popen(
            [*command, "benchmarks.ranks", "worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )

    def run(self) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("a rank failed; its message is above")
        result: dict[str, Any] = json.loads(line)
        return result

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main(
    shape: str = "1b",
    ranks: int = 2,
    dtype: str = "bfloat16",
    prompt: int = 64,
    new: int = 32,
    runs: int = 5,
) -> None:
    """Measure and print. See the file's head."""
    check_model(shape, dtype)
    check_counts(ranks=ranks, prompt=prompt, new=new, runs=runs)
    arguments = [shape, dtype, str(prompt), str(new)]
    one, several = Job(1, ranks, arguments), Job(ranks, 1, arguments)
    try:
        warm = [job.run() for job in (one, several)]
        for _ in range(runs):
            for job in (one, several):
                job.runs.append(job.run())
    finally:
        one.end(), several.end()

    def median(job: Job, what: str) -> float:
        return statistics.median(run[what] for run in job.runs)

    speed = {job: 1 / median(job, "step_s") for job in (one, several)}
    result = {
        "shape": shape,
        "ranks": ranks,
        "dtype": dtype,
        "one_rank_tok_s": speed[one],
        "ranks_tok_s": speed[several],
        "ratio": speed[several] / speed[one],
        "one_rank_first_token_s": median(one, "first_token_s"),
        "ranks_first_token_s": median(several, "first_token_s"),
        "same_first_id": warm[0]["ids"][0] == warm[1]["ids"][0],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
    else:
        run_script(main, "benchmarks.ranks")
