"""Compare two checkouts of this repository in one alternating run.

    python -m benchmarks.checkouts ../old . --shape 135m
    python -m benchmarks.checkouts ../old . --shape 1b --quantize int8 --rounds 5 --out int8.json

In each round, each checkout has a process of its own, which builds the same random checkpoint and
measures prefill, greedy decoding and peak memory through the public API (`checkout_worker`). The
order alternates from a random start. Prints the medians and the ratios new / old, and one JSON
line, which --out saves.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import checkout_worker
from benchmarks.checkout_worker import Task
from benchmarks.flags import check_counts, check_file, check_model
from benchmarks.random_checkpoint import SHAPES, SPECIAL_TOKENS, RandomSource, write_rank_file
from benchmarks.report import Better, Figure, finish, make_result
from benchmarks.script import run_benchmark
from benchmarks.workers import Reader, Worker
from llama.checkpoints.formats.meta_export import write_meta

PREFILL = (128, 512)  # lengths of prompts
PROMPT, NEW = 128, 64  # of the decoding
READ_BYTES = 1 << 30  # size of the tensor whose reading is timed
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
Rounds = dict[str, list[dict[str, Any]]]  # {"old" or "new": the worker's answer in each round}


def check_checkout(folder: str) -> Path:
    """The absolute path of a checkout.

    Raises:
        FileNotFoundError: there is no `llama` package.
    """
    path = Path(folder).resolve()
    if not (path / "llama" / "__init__.py").is_file():
        raise FileNotFoundError(f"{folder} is not a checkout of this repository: it has no llama/")
    return path


def commit(checkout: Path) -> str | None:
    """The commit of a checkout, with "-dirty" if files differ from it; None without git."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run_worker(checkout: Path, task: Task) -> dict[str, Any]:
    """Measure a checkout in a new process that imports its `llama`.

    Raises:
        RuntimeError: the process failed; its message is on stderr.
    """
    # As `python SCRIPT` would, but without the folder of the script on the import path.
    start = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    worker = str(Path(checkout_worker.__file__).resolve())
    process = subprocess.run(
        [sys.executable, "-c", start, worker, json.dumps(asdict(task))],
        cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(f"the worker in {checkout} ended with exit code {process.returncode}")
    answer: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return answer


def measure(checkouts: dict[str, Path], task: Task, rounds: int) -> tuple[Rounds, list[float]]:
    """Returns (answers, bandwidth of reading memory before each round in bytes per second)."""
    answers: Rounds = {name: [] for name in checkouts}
    order, reads = list(checkouts), []
    random.shuffle(order)
    with Worker("the reading", Reader, READ_BYTES) as reader:
        for i in range(rounds):
            reads.append(reader.call("read"))
            for name in order:
                answers[name].append(run_worker(checkouts[name], task))
            order.reverse()
            print(f"round {i + 1} of {rounds} is done", file=sys.stderr, flush=True)
    return answers, reads


def make_figures(answers: Rounds) -> list[Figure]:
    """A row for each quantity; columns old, new and the ratio of their medians."""
    figures = []
    for n in answers["old"][0]["prefill_s"]:
        values = partial(prefill_speed, length=n)
        figures += row(f"prefill of {n} tokens", "tok/s", answers, values, better="higher")
    figures += row(f"decode after {PROMPT} tokens", "tok/s", answers, decode_speed, better="higher")
    figures += row("build", "s", answers, lambda answer: [answer["build_s"]], better="lower")
    for kind in answers["old"][0]["peak_GiB"]:
        values = partial(peak_memory, kind=kind)
        figures += row(f"peak {kind} memory", "GiB", answers, values, better="lower")
    return figures


def prefill_speed(answer: dict[str, Any], length: str) -> list[float]:
    return [int(length) / seconds for seconds in answer["prefill_s"][length]]


def decode_speed(answer: dict[str, Any]) -> list[float]:
    return [1 / seconds for seconds in answer["step_s"]]


def peak_memory(answer: dict[str, Any], kind: str) -> list[float]:
    return [answer["peak_GiB"][kind]]


def row(
    name: str,
    unit: str,
    answers: Rounds,
    values: Callable[[dict[str, Any]], list[float]],
    *,
    better: Better,
) -> list[Figure]:
    """The figures of a row.

    Args:
        values: takes the values of one round from a worker's answer.
    """
    runs = {
        which: [value for answer in each for value in values(answer)]
        for which, each in answers.items()
    }
    ratio = statistics.median(runs["new"]) / statistics.median(runs["old"])
    figures = [Figure(name, which, unit, each, better=better) for which, each in runs.items()]
    return [*figures, Figure(name, "new / old", "", [ratio], better=better)]


def main(
    old_dir: str,
    new_dir: str,
    shape: str = "135m",
    dtype: str = "bf16",
    quantize: str | None = None,
    rounds: int = 5,
    repeats: int = 5,
    seed: int = 0,
    out: str | None = None,
) -> None:
    """Measure and print.

    Args:
        old_dir: the checkout to compare with.
        new_dir: the other checkout.
        shape: 135m, 1b, 3b or 8b.
        dtype: bf16, fp16 or fp32.
        quantize: int8 or int4; default: neither.
        rounds: of one process of each checkout.
        repeats: of each measurement in a process.
        seed: of the weights.
        out: a JSON file to write.
    """
    check_model(shape, DTYPES.get(dtype, dtype), quantize)
    check_counts(rounds=rounds, repeats=repeats)
    check_file("out", out, ".json")
    checkouts = {"old": check_checkout(old_dir), "new": check_checkout(new_dir)}
    versions = {name: commit(path) for name, path in checkouts.items()}
    settings: dict[str, Any] = {
        "shape": shape,
        "dtype": DTYPES.get(dtype, dtype),
        "quantize": quantize,
    }
    settings |= {"rounds": rounds, "repeats": repeats, "seed": seed, "prompt": PROMPT, "new": NEW}
    with TemporaryDirectory(prefix="benchmark-") as folder:
        answers, reads = measure(checkouts, make_task(Path(folder), settings), rounds)
    ids = [answer["ids"] for each in answers.values() for answer in each]
    same = all(each == ids[0] for each in ids)
    result = make_result(
        f"checkouts {shape}, {quantize or settings['dtype']}",
        settings,
        make_figures(answers),
        statistics.median(reads) / 1e9,
        checkouts=versions,
        same_ids=same,
    )
    print(f"old: {versions['old']}, new: {versions['new']}")
    print(f"all answers have the same ids: {'yes' if same else 'NO'}")
    finish(result, out)


def make_task(folder: Path, settings: dict[str, Any]) -> Task:
    """Write the checkpoint and its tokenizer into the folder."""
    params = SHAPES[settings["shape"]]
    write_meta(RandomSource(params, settings["seed"]), None, folder, torch.bfloat16)
    write_rank_file(folder / "tokenizer.model", params["vocab_size"])
    return Task(
        ckpt_dir=str(folder),
        tokenizer_path=str(folder / "tokenizer.model"),
        dtype=settings["dtype"],
        quantize=settings["quantize"],
        vocab_size=params["vocab_size"] - SPECIAL_TOKENS,
        prefill=list(PREFILL),
        prompt=settings["prompt"],
        new=settings["new"],
        repeats=settings["repeats"],
    )


if __name__ == "__main__":
    run_benchmark(main, "checkouts")
