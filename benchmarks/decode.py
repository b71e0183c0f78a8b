"""Prefill and decode beside other systems, with the same random weights, alternately in one run.

    python -m benchmarks.decode --shape 1b --prompt 128 --new 32 --peers reference,transformers
    python -m benchmarks.decode --shape 1b --quantize int8 --peers llama.cpp,bf16 --out int8.json
    python -m benchmarks.decode --shape 135m --batch 8 --prompt 512 --plot decode.png

Prints a table and one JSON line, which --out saves. docs/performance.md says how to install the
peers and what the columns mean. Each system has its own process, and only one runs at a time.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.flags import check_counts, check_file, check_model
from benchmarks.memory import anonymous_bytes, peak_anonymous, resident_bytes
from benchmarks.ours import random_prompts
from benchmarks.peers import OURS, Job, check_peers, make_system
from benchmarks.plot import save_plot
from benchmarks.random_checkpoint import SHAPES
from benchmarks.report import Figure, finish, machine, make_result
from benchmarks.same_model import Preparation
from benchmarks.script import run_benchmark
from benchmarks.workers import Reader, Worker

READ_BYTES = 1 << 30  # size of the tensor whose reading is timed


class Measured:
    """A system with its prompts, as an object for a `Worker`."""

    def __init__(self, name: str, job: Job, context: int, prompt: int):
        self.system = make_system(name, job)
        ids = random_prompts(job.params["vocab_size"], [context + prompt] * job.rows)
        self.context = [row[:context] for row in ids]
        self.prompts = [row[context:] for row in ids]

    def warm(self, new: int) -> dict[str, Any]:
        """Fill the cache with the context and run a round that does not count.

        Returns:
            weight_bytes and position_bytes of the `System`; cold_first_token_s; own_GiB and
            mapped_GiB, memory of the process without and with a file behind it (None off Linux).
        """
        facts: dict[str, Any] = {
            "weight_bytes": self.system.weight_bytes,
            "position_bytes": self.system.position_bytes,
        }
        try:
            before = anonymous_bytes()
        except OSError:  # not Linux
            facts["cold_first_token_s"] = self._first_token(new)
            return facts | {"own_GiB": None, "mapped_GiB": None}
        peak: dict[str, float] = {}
        with peak_anonymous(peak):
            facts["cold_first_token_s"] = self._first_token(new)
        facts["own_GiB"] = before / 2**30 + peak["peak_GiB"]
        facts["mapped_GiB"] = resident_bytes("RssFile") / 2**30
        return facts

    def _first_token(self, new: int) -> float:
        """Seconds from an empty cache until each row has an id."""
        start = time.perf_counter()
        if self.context[0]:
            self.system.fill(self.context)
        filled = time.perf_counter() - start
        return filled + self.system.generate(self.prompts, new)[1]

    def round(self, new: int) -> tuple[list[list[int]], float, float]:
        """As `System.generate`."""
        return self.system.generate(self.prompts, new)


@dataclass
class Run:
    """The process of a system, and its measurements."""

    name: str
    worker: Worker
    facts: dict[str, Any] = field(default_factory=dict)  # of `Measured.warm`
    first: list[float] = field(default_factory=list)  # seconds to the first token
    step: list[float] = field(default_factory=list)  # seconds of a decode step
    first_ids: list[int] = field(default_factory=list)

    def measure(self, new: int) -> None:
        ids, first, others = self.worker.call("round", new)
        self.first.append(first)
        self.step.append(others / (new - 1))
        self.first_ids = [row[0] for row in ids]


def measure(
    job: Job, names: list[str], options: dict[str, int]
) -> tuple[list[Figure], list[float]]:
    """Check and warm all systems, then measure them alternately.

    Returns:
        (the figures, bandwidths of reading memory between the rounds in bytes per second).
    """
    prompt, new, context = options["prompt"], options["new"], options["context"]
    with Worker("the preparation", Preparation) as worker:
        differences = worker.call("run", job, names)
    warn_of_memory(job.folder)
    with ExitStack() as stack:
        reader = stack.enter_context(Worker("the reading", Reader, READ_BYTES))
        runs = [
            Run(name, stack.enter_context(Worker(name, Measured, name, job, context, prompt)))
            for name in [OURS, *names]
        ]
        for run in runs:
            run.facts = run.worker.call("warm", new)
        reads = [reader.call("read")]
        for _ in range(options["runs"]):
            for run in runs:
                run.measure(new)
            reads.append(reader.call("read"))
    bandwidth = statistics.median(reads)
    figures = []
    for run in runs:
        figures += speeds(run, runs[0], job, options, bandwidth)
        figures += properties(run, runs[0], job, differences[run.name])
    return figures, reads


def speeds(
    run: Run, ours: Run, job: Job, options: dict[str, int], bandwidth: float
) -> list[Figure]:
    """What was measured in each round."""
    title, prompt_ids = job.title(run.name), job.rows * options["prompt"]
    # A step reads the weights once, and the cache of each row as far as it is filled on average.
    filled = options["context"] + options["prompt"] + options["new"] / 2
    size = run.facts["weight_bytes"] + job.rows * filled * run.facts["position_bytes"]
    our_step = statistics.median(ours.step)
    return [
        Figure(title, "first token", "s", run.first, "lower"),
        Figure(title, "prefill", "tok/s", [prompt_ids / t for t in run.first], "higher"),
        Figure(title, "decode", "tok/s", [job.rows / t for t in run.step], "higher"),
        Figure(title, "read in a step", "GB/s", [size / t / 1e9 for t in run.step], "higher"),
        Figure(title, "of bandwidth", "", [size / t / bandwidth for t in run.step], "higher"),
        Figure(title, "step / llama3's", "", [t / our_step for t in run.step], "lower"),
    ]


def properties(run: Run, ours: Run, job: Job, difference: float) -> list[Figure]:
    """What was measured once."""
    title, facts = job.title(run.name), run.facts
    same = sum(a == b for a, b in zip(run.first_ids, ours.first_ids, strict=True))
    cold, weights = facts["cold_first_token_s"], facts["weight_bytes"] / 1e9
    figures = [
        Figure(title, "cold first token", "s", [cold], "lower"),
        Figure(title, "weights read", "GB", [weights], "lower"),
        Figure(title, "logits differ by", "", [difference], "lower"),
        Figure(title, "rows with the same first id", "", [same], "higher"),
    ]
    if facts["own_GiB"] is not None:
        figures += [
            Figure(title, "own memory", "GiB", [facts["own_GiB"]], "lower"),
            Figure(title, "mapped memory", "GiB", [facts["mapped_GiB"]]),
        ]
    return figures


def warn_of_memory(folder: Path) -> None:
    """Print a warning if the weights of all systems exceed memory and would be read from disk."""
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return
    [free] = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    if size > free:
        print(
            f"warning: the files of weights have {size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB "
            "of memory are free: the disk may limit the speed; use fewer peers"
        )


def check(shape: str, dtype: str, quantize: str | None, plot: str | None, out: str | None) -> None:
    """Raise a ValueError or ImportError for bad flags, before anything is written."""
    check_model(shape, dtype, quantize)
    if plot is not None and find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'llama3[bench]'")
    check_file("plot", plot, ".png")
    check_file("out", out, ".json")


def main(
    shape: str = "135m",
    dtype: str = "bfloat16",
    quantize: str | None = None,
    compile: bool = False,
    batch: int = 1,
    prompt: int = 128,
    context: int = 0,
    new: int = 32,
    runs: int = 5,
    peers: str = "",
    plot: str | None = None,
    out: str | None = None,
) -> None:
    """Measure and print.

    Args:
        shape: 135m, 1b, 3b or 8b.
        dtype: bfloat16, float16 or float32.
        quantize: int8 or int4: weights of this library, and of llama.cpp (Q8_0, Q4_0).
        compile: compile this library's decode step.
        batch: prompts at once.
        prompt: tokens of each prompt.
        context: tokens before each prompt, cached before the timing.
        new: tokens that follow each prompt.
        runs: rounds of which the median counts.
        peers: names separated by commas: reference, transformers, llama.cpp, llama.cpp-bf16 (not
            quantized), exact (this library with the reference's arithmetic), bf16 (this library,
            neither quantized nor compiled).
        plot: a PNG file to draw.
        out: a JSON file to write.
    """
    options = {"batch": batch, "prompt": prompt, "context": context, "new": new, "runs": runs}
    names = [name for name in peers.split(",") if name]
    check(shape, dtype, quantize, plot, out)
    check_counts(**options)
    check_peers(names)
    params = {"norm_eps": 1e-5} | SHAPES[shape]
    if params.get("use_scaled_rope"):
        params["rope_scale_factor"] = 8.0  # the only one that Meta's published code knows
    print(", ".join(f"{name} {value}" for name, value in machine().items()), flush=True)
    with TemporaryDirectory(prefix="benchmark-") as folder:
        length = context + prompt + new
        job = Job(params, Path(folder), dtype, quantize, compile, batch, length)
        figures, reads = measure(job, names, options)
    settings = {"shape": shape, "dtype": dtype, "quantize": quantize, "compile": compile, **options}
    varied = {"compile": compile, "batch": batch != 1 and batch, "prompt": prompt}
    varied["context"] = context
    extra = [f"{key} {value}" for key, value in varied.items() if value]
    result = make_result(
        f"decode {', '.join([shape, quantize or dtype, *extra])}",
        settings,
        figures,
        statistics.median(reads) / 1e9,
        read_GB_s_each=[read / 1e9 for read in reads],
        row_heading="system",
    )
    if plot is not None:
        save_plot(figures, Path(plot), result["name"])
    finish(result, out)


if __name__ == "__main__":
    run_benchmark(main, "decode")
