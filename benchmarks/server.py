"""`llama3 serve` beside its engine alone, and beside llama.cpp's server, in one alternating run.

    python -m benchmarks.server --llama_server llama.cpp/build/bin/llama-server
    python -m benchmarks.server --shape 1b --streams 8 --new 32 --parts throughput

In each round each system gets the same new prompts. Prints a table for each part, and one JSON
line, which --out saves. docs/server.md says what the parts are.
"""

from __future__ import annotations

import random
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.flags import check_counts, check_file
from benchmarks.kernels import counts
from benchmarks.random_checkpoint import SHAPES
from benchmarks.report import Figure, finish, make_result
from benchmarks.script import run_benchmark
from benchmarks.server_systems import ENGINE, System, checkpoint, start_systems
from benchmarks.tables import tables_by_part
from llama.checkpoints.open import open_checkpoint, open_tokenizer

PARTS = ("throughput", "first", "health", "prefill")
SINGLE = 5  # prompts of a system in a turn of the part `first`
TURNS = 4  # of the part `first` in a round: a short figure needs many alternations
LONG = 2000  # ids of the long prompt
TEXT = Path(__file__).resolve().parents[1] / "docs"
Part = tuple[str, Figure]


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        streams: numbers of requests at a time.
        prompt, new: ids of each prompt and of each answer.
    """

    rounds: int
    streams: tuple[int, ...]
    prompt: int
    new: int


class Prompts:
    """Pieces of this repository's documentation, each another one."""

    def __init__(self, ckpt_dir: str):
        text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(TEXT.glob("*.md")))
        tokenizer = open_tokenizer(open_checkpoint(ckpt_dir))
        self.ids = tokenizer.encode(text, bos=False, eos=False)
        self.random = random.Random(0)

    def take(self, count: int, length: int) -> list[list[int]]:
        starts = [self.random.randrange(len(self.ids) - length) for _ in range(count)]
        return [self.ids[start : start + length] for start in starts]


Results = dict[str, list[dict[str, Any]]]  # what each system answered in each round


def alternate(systems: dict[str, System], rounds: int, method: str, make: Callable[[], Any]) -> Any:
    """Call a method of each system in each round, in an order that alternates.

    Args:
        make: the arguments of a round.
    """
    results: Results = {name: [] for name in systems}
    order = list(systems)
    for i in range(rounds):
        args = make()
        for name in order:
            results[name].append(systems[name].call(method, *args))
        order.reverse()
        print(f"{method}: round {i + 1} of {rounds} is done", file=sys.stderr, flush=True)
    return results


def throughput(systems: dict[str, System], prompts: Prompts, plan: Plan) -> Iterable[Part]:
    """Tokens per second and time to the first token, with several requests at a time."""
    for streams in plan.streams:

        def make(streams: int = streams) -> Any:
            return prompts.take(streams, plan.prompt), plan.new, streams

        results = alternate(systems, plan.rounds, "throughput", make)
        rates = {name: [each["rate"] for each in found] for name, found in results.items()}
        for name, found in results.items():
            row = f"{streams} stream{'s' * (streams > 1)}: {name}"
            first = [1000 * statistics.median(each["first"]) for each in found]
            yield "throughput", Figure(row, "tokens", "tok/s", rates[name], better="higher")
            yield "throughput", Figure(row, "first token", "ms", first, better="lower")
            ratio = statistics.median(rates[name]) / statistics.median(rates[ENGINE])
            yield "throughput", Figure(row, "of the engine's", "", [ratio], better="higher")
            cpu = [each["cpu"] for each in found]
            yield "throughput", Figure(row, "client, of a core", "", cpu, better=None)


def first_token(systems: dict[str, System], prompts: Prompts, plan: Plan) -> Iterable[Part]:
    """The first token of one request at a time."""
    results = alternate(
        systems,
        plan.rounds * TURNS,
        "throughput",
        lambda: (prompts.take(SINGLE, plan.prompt), 2, 1),
    )
    medians = {
        name: [1000 * statistics.median(each["first"]) for each in found]
        for name, found in results.items()
    }
    for name, values in medians.items():
        added = statistics.median(values) - statistics.median(medians[ENGINE])
        part = "first token of a single request"
        yield part, Figure(name, "median", "ms", values, better="lower")
        yield part, Figure(name, "beyond the engine's", "ms", [added], better="lower")


def health(systems: dict[str, System], prompts: Prompts, plan: Plan) -> Iterable[Part]:
    """/health while the most streams decode."""
    servers = {name: system for name, system in systems.items() if name != ENGINE}
    most = max(plan.streams)
    results = alternate(
        servers,
        plan.rounds,
        "throughput",
        lambda: (prompts.take(most, plan.prompt), plan.new, most, True),
    )
    for name, found in results.items():
        values = [1000 * value for each in found for value in each["health"]]
        part = f"/health beside {most} streams"
        for column, percent in (("median", 50), ("p99", 99), ("longest", 100)):
            yield part, Figure(name, column, "ms", [percentile(values, percent)], better="lower")
        yield part, Figure(name, "asked", "times", [len(values)])


def prefill(systems: dict[str, System], prompts: Prompts, plan: Plan) -> Iterable[Part]:
    """Gaps in seven streams while a long prompt is computed."""
    results = alternate(
        systems,
        plan.rounds,
        "beside_prefill",
        lambda: (prompts.take(7, plan.prompt), prompts.take(1, LONG)[0], 400),
    )
    for name, found in results.items():
        gaps = [1000 * gap for each in found for gap in each["gaps"]]
        part = f"gaps of 7 streams beside a prompt of {LONG} tokens"
        for column, percent in (("median", 50), ("p99", 99), ("longest", 100)):
            yield part, Figure(name, column, "ms", [percentile(gaps, percent)], better="lower")
        first = [1000 * value for each in found for value in each["first"]]
        yield part, Figure(name, "first token of the long prompt", "ms", first, better="lower")


def percentile(values: list[float], percent: int) -> float:
    """The smallest value that `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


MEASURE = dict(zip(PARTS, (throughput, first_token, health, prefill), strict=True))


def main(
    shape: str = "demo",
    rounds: int = 5,
    streams: str = "1,8,16",
    prompt: int = 64,
    new: int = 128,
    parts: str = ",".join(PARTS),
    llama_server: str | None = None,
    out: str | None = None,
) -> None:
    """Measure and print.

    Args:
        shape: demo (the demo model), or 135m, 1b, 3b or 8b with random weights.
        rounds: of all systems.
        streams: how many requests at a time.
        prompt: ids of each prompt.
        new: ids that each request generates.
        parts: of throughput, first, health and prefill.
        llama_server: llama.cpp's `llama-server`, to measure beside.
        out: a JSON file to write.
    """
    chosen = check(shape, parts, llama_server)
    numbers = tuple(n for (n,) in counts("streams", streams, "1,8,16"))
    check_counts(rounds=rounds, prompt=prompt, new=new)
    check_file("out", out, ".json")
    plan = Plan(rounds, numbers, prompt, new)
    rows = max(8, *numbers)
    length = 256 + max(prompt + new, LONG if "prefill" in chosen else 0)
    found: list[Part] = []
    with TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        ckpt_dir = checkpoint(shape, folder)
        prompts = Prompts(ckpt_dir)
        with start_systems(ckpt_dir, rows, length, llama_server, folder) as systems:
            for system in systems.values():  # reads the weights; does not count
                system.call("throughput", prompts.take(2, prompt), 4, 2)
            for part in chosen:
                found += MEASURE[part](systems, prompts, plan)
    settings = {"shape": shape, "rounds": rounds, "streams": list(numbers), "prompt": prompt}
    settings |= {"new": new, "rows": rows, "length": length}
    result = make_result(f"server {shape}", settings, [figure for _, figure in found])
    if llama_server is not None:
        result["versions"]["llama-server"] = llama_server_version(llama_server)
    for figure, (part, _) in zip(result["figures"], found, strict=True):
        figure["part"] = part
    print("\n".join(tables_by_part([result])))
    finish(result, out, show_table=False)


def llama_server_version(binary: str) -> str:
    """What `llama-server --version` says, such as "0.5.0-dev"."""
    done = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"version: (\S+)", done.stdout + done.stderr)
    return found[1] if found else "unknown"


def check(shape: str, parts: str, llama_server: str | None) -> list[str]:
    """Check flags; returns the parts."""
    if shape not in ("demo", *SHAPES):
        raise ValueError(f"unknown shape {shape!r}; use demo or one of {', '.join(SHAPES)}")
    chosen = [part.strip() for part in str(parts).split(",")]
    for part in chosen:
        if part not in PARTS:
            raise ValueError(f"unknown part {part!r}; the parts are {', '.join(PARTS)}")
    if llama_server is not None and not Path(llama_server).is_file():
        raise FileNotFoundError(f"no llama-server at {llama_server}; docs/server.md says how")
    return chosen


if __name__ == "__main__":
    run_benchmark(main, "server")
