"""This library beside every peer that is installed, with the same weights, alternately in one run.

    python -m benchmarks.compare speed --shape 135m --out compare-135m.json
    python -m benchmarks.compare speed --shape 1b --systems llama3-int4,llama.cpp-Q4_0 --rounds 3
    python -m benchmarks.compare perplexity --file tinyshakespeare.txt --out perplexity.json

Prints tables and one JSON line, which --out saves. docs/performance.md says how to install the
peers and what the columns mean. Each system has a process of its own, which is stopped while
another one is measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.compare_perplexity import perplexity
from benchmarks.flags import check_counts, check_dtype, check_file
from benchmarks.ours import random_prompts
from benchmarks.peers import OURS, SYSTEMS, Job, check_systems, make_system, open_source, title
from benchmarks.random_checkpoint import RandomSource
from benchmarks.report import Figure, finish, make_result
from benchmarks.same_model import Preparation
from benchmarks.script import run_benchmark
from benchmarks.tables import tables_by_part
from benchmarks.workers import Reader, Worker

READ_BYTES = 1 << 30  # size of the tensor whose reading is timed
SPEED, RATIO = "speed", "llama3 / peer (above 1: llama3 is faster)"


@dataclass(frozen=True)
class Work:
    """Prompts of random ids, and greedy ids after them.

    Attributes:
        prefill, decode: columns of their speeds; None where that is not of interest.
    """

    rows: int
    prompt: int
    new: int
    prefill: str | None = None
    decode: str | None = None


class Measured:
    """A system, as an object for a `Worker`."""

    def __init__(self, name: str, job: Job):
        self.system = make_system(name, job)
        self.vocab_size: int = job.params["vocab_size"]

    def facts(self) -> dict[str, Any]:
        """weight_bytes, position_bytes and about of the `System`."""
        system = self.system
        return {
            "weight_bytes": system.weight_bytes,
            "position_bytes": system.position_bytes,
            "about": system.about,
        }

    def run(self, work: Work) -> tuple[list[int], float, float]:
        """(first id of each row, seconds until each row has one, seconds of a later step)."""
        prompts = random_prompts(self.vocab_size, [work.prompt] * work.rows)
        ids, first, others = self.system.generate(prompts, work.new)
        return [row[0] for row in ids], first, others / max(work.new - 1, 1)


@dataclass
class Run:
    """The process of a system and what it has measured."""

    name: str
    worker: Worker
    facts: dict[str, Any] = field(default_factory=dict)
    first_ids: list[int] = field(default_factory=list)  # of one row
    speeds: dict[str, list[float]] = field(default_factory=dict)  # tok/s of each column and round
    shares: list[float] = field(default_factory=list)  # of the speed of reading, one row
    failure: str | None = None

    def measure(self, work: Work, reading: float | None) -> None:
        """Run once. A failure ends the measurements of this system.

        Args:
            reading: bytes per second of reading memory just before; None: the run does not count.
        """
        if self.failure is not None:
            return
        try:
            self.facts = self.facts or self.worker.call("facts")
            ids, first, step = self.worker.call("run", work)
        except RuntimeError as e:
            self.failure = str(e)
            print(f"{self.name} is left out: {e}", flush=True)
            return
        if reading is None:
            self.first_ids = self.first_ids or ids
            return
        for column, seconds, n in (
            (work.prefill, first, work.rows * work.prompt),
            (work.decode, step, work.rows),
        ):
            if column is not None:
                self.speeds.setdefault(column, []).append(n / seconds)
        if work.rows == 1 and work.decode is not None:
            filled = work.prompt + work.new / 2
            size = self.facts["weight_bytes"] + filled * self.facts["position_bytes"]
            self.shares.append(size / step / reading)


def measure(
    job: Job, works: Sequence[Work], names: Sequence[str], rounds: int
) -> tuple[list[Run], list[float]]:
    """Run each work in each system, alternately.

    Returns:
        (the runs, speeds of reading memory before each work in bytes per second).
    """
    reads: list[float] = []
    with ExitStack() as stack:
        reader = stack.enter_context(Worker("the reading", Reader, READ_BYTES))
        runs = [Run(n, stack.enter_context(Worker(n, Measured, n, job))) for n in names]
        for run in runs:  # builds it
            for work in works:
                run.measure(work, None)
        for i in range(rounds):
            print(f"round {i + 1} of {rounds}", flush=True)
            for work in works:
                reads.append(reader.call("read"))
                for j in range(len(runs)):  # each round starts with another system
                    runs[(i + j) % len(runs)].measure(work, reads[-1])
    return runs, reads


def speed_figures(runs: Sequence[Run], dtype: str, differences: dict[str, float]) -> list[Figure]:
    """The speeds of each system, and what else is known of it."""
    figures = []
    working = [run for run in runs if run.failure is None]
    for run in working:
        name = title(run.name, dtype)
        for column, speeds in run.speeds.items():
            figures.append(Figure(name, column, "tok/s", speeds, better="higher"))
        same = sum(a == b for a, b in zip(run.first_ids, working[0].first_ids, strict=True))
        figures += [
            Figure(name, "of reading", "", run.shares, better="higher"),
            Figure(name, "weights read", "GB", [run.facts["weight_bytes"] / 1e9], better="lower"),
            Figure(name, "logits differ by", "", [differences[run.name]], better="lower"),
            Figure(name, "same first id (1: yes)", "", [same], better="higher"),
        ]
    return figures


def ratio_figures(runs: Sequence[Run], dtype: str) -> list[Figure]:
    """Ratios of medians: this library and its peers, its schemes and its unquantized weights."""
    figures = []
    working = {run.name: run for run in runs if run.failure is None}
    for ours, peer in pairs(list(working)):
        for column, speeds in working[ours].speeds.items():
            theirs = statistics.median(working[peer].speeds[column])
            ratio = statistics.median(speeds) / theirs
            row = f"{title(ours, dtype)} / {title(peer, dtype)}"
            figures.append(Figure(row, column, "", [ratio], better="higher"))
    return figures


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """(a system of this library, a peer of about as many bits), among `names`."""
    bits = {None: 16, "eager": 16, "sdpa": 16, "int8": 8, "Q8_0": 8, "int4": 4, "Q4_0": 4}
    bits["Q4_K_M"] = 4
    return [
        (ours, peer)
        for ours in names
        for peer in names
        if SYSTEMS[ours][0] == OURS
        and peer != ours
        and (bits[SYSTEMS[peer][1]] == bits[SYSTEMS[ours][1]] or peer == OURS)
    ]


def prepare_and_measure(
    shape: str,
    dtype: str,
    works: Sequence[Work],
    names: Sequence[str],
    rounds: int,
) -> tuple[list[Run], list[float], dict[str, float]]:
    """Write the weights for each system, and measure; (runs, speeds of reading, differences)."""
    source = open_source(shape)
    weights = source if isinstance(source, RandomSource) else source.path
    with TemporaryDirectory(prefix="benchmark-") as folder:
        rows, length = max(w.rows for w in works), max(w.prompt + w.new for w in works)
        job = Job(dict(source.params), Path(folder), dtype, rows=rows, length=length)
        with Worker("the preparation", Preparation) as worker:
            differences = worker.call("run", job, weights, names)
        runs, reads = measure(job, works, names, rounds)
    return runs, reads, differences


def speed(
    shape: str = "135m",
    systems: str = ",".join(SYSTEMS),
    dtype: str = "bfloat16",
    prompt: int = 128,
    long_prompt: int = 512,
    batch: int = 8,
    new: int = 48,
    rounds: int = 5,
    out: str | None = None,
) -> None:
    """Measure and print.

    Args:
        shape: 135m, 1b, 3b or 8b with random weights, or demo: the demo model.
        systems: their names, separated by commas; those whose package is missing are skipped.
        dtype: of the weights that are not quantized: bfloat16, float16 or float32.
        prompt: tokens of a prompt.
        long_prompt: tokens of a prompt whose prefill is measured alone.
        batch: rows that decode at once in the last column.
        new: tokens that follow each prompt.
        rounds: of which the median counts.
        out: a JSON file to write.
    """
    counts = {"prompt": prompt, "long_prompt": long_prompt, "batch": batch, "new": new}
    check_dtype(dtype)
    check_file("out", out, ".json")
    check_counts(**counts, rounds=rounds)
    names, notes = check_systems(systems)
    works = [
        Work(1, prompt, new, f"prefill {prompt}", f"decode after {prompt}"),
        Work(1, long_prompt, 1, f"prefill {long_prompt}"),
        Work(batch, prompt, new, None, f"decode of {batch} rows"),
    ]
    runs, reads, differences = prepare_and_measure(shape, dtype, works, names, rounds)
    notes += [f"{run.name} failed: {run.failure}" for run in runs if run.failure is not None]
    figures = speed_figures(runs, dtype, differences)
    result = make_result(
        f"compare {shape}",
        {"shape": shape, "systems": names, "dtype": dtype, "rounds": rounds} | counts,
        [*figures, *ratio_figures(runs, dtype)],
        statistics.median(reads) / 1e9,
        read_GB_s_each=[read / 1e9 for read in reads],
        row_heading="system",
        about={run.name: run.facts["about"] for run in runs if run.facts.get("about")},
        notes=notes,
    )
    for i, figure in enumerate(result["figures"]):
        figure["part"] = f"{shape}: {SPEED if i < len(figures) else RATIO}"
    print("\n".join(tables_by_part([result])))
    finish(result, out, show_table=False)


if __name__ == "__main__":
    run_benchmark({"speed": speed, "perplexity": perplexity}, "compare")
