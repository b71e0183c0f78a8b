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
    job: Job, names: list[str], options: dict[str, Any]
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
        figures += speeds(run, runs[0], job, options, bandwidth=bandwidth)
        figures += properties(run, runs[0], job, differences[run.name])
    return figures, reads


def speeds(
    run: Run, ours: Run, job: Job, options: dict[str, Any], *, bandwidth: float
) -> list[Figure]:
    """What was measured in each round."""
    name, prompt_ids = job.title(run.name), job.rows * options["prompt"]
    # A step reads the weights once, and the cache of each row as far as it is filled on average.
    filled = options["context"] + options["prompt"] + options["new"] / 2
    size = run.facts["weight_bytes"] + job.rows * filled * run.facts["position_bytes"]
    our_step = statistics.median(ours.step)
    return [
        Figure(name, "first token", "s", run.first, better="lower"),
        Figure(name, "prefill", "tok/s", [prompt_ids / t for t in run.first], better="higher"),
        Figure(name, "decode", "tok/s", [job.rows / t for t in run.step], better="higher"),
        Figure(name, "read in a step", "GB/s", [size / t / 1e9 for t in run.step], better="higher"),
        Figure(name, "of bandwidth", "", [size / t / bandwidth for t in run.step], better="higher"),
        Figure(name, "step / llama3's", "", [t / our_step for t in run.step], better="lower"),
    ]


def properties(run: Run, ours: Run, job: Job, difference: float) -> list[Figure]:
    """What was measured once."""
    name, facts = job.title(run.name), run.facts
    same = sum(a == b for a, b in zip(run.first_ids, ours.first_ids, strict=True))
    cold, weights = facts["cold_first_token_s"], facts["weight_bytes"] / 1e9
    figures = [
        Figure(name, "cold first token", "s", [cold], better="lower"),
        Figure(name, "weights read", "GB", [weights], better="lower"),
        Figure(name, "logits differ by", "", [difference], better="lower"),
        Figure(name, "rows with the same first id", "", [same], better="higher"),
    ]
    if facts["own_GiB"] is not None:
        figures += [
            Figure(name, "own memory", "GiB", [facts["own_GiB"]], better="lower"),
            Figure(name, "mapped memory", "GiB", [facts["mapped_GiB"]]),
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


def check_files(plot: str | None, out: str | None) -> None:
    """Raise an ImportError or ValueError if the plot or the result could not be written."""
    if plot is not None and find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install -e '.[bench]'")
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
        peers: of reference, transformers, llama.cpp, llama.cpp-bf16, exact, bf16; separated by
            commas. docs/performance.md explains them.
        plot: a PNG file to draw.
        out: a JSON file to write.
    """
    options = {"batch": batch, "prompt": prompt, "context": context, "new": new, "runs": runs}
    names = [name for name in peers.split(",") if name]
    check_model(shape, dtype, quantize)
    check_files(plot, out)
    check_counts(**options)
    check_peers(names)
    settings = {"shape": shape, "dtype": dtype, "quantize": quantize, "compile": compile}
    figures, reads = measure_shape(settings | options, names)
    result = make_result(
        f"decode {title(settings | options)}",
        settings | options | {"peers": names},
        figures,
        statistics.median(reads) / 1e9,
        read_GB_s_each=[read / 1e9 for read in reads],
        row_heading="system",
    )
    if plot is not None:
        save_plot(figures, Path(plot), result["name"])
    finish(result, out)


def measure_shape(settings: dict[str, Any], names: list[str]) -> tuple[list[Figure], list[float]]:
    """`measure` with random weights of a shape, which are written into a temporary folder."""
    print(", ".join(f"{name} {value}" for name, value in machine().items()), flush=True)
    params = {"norm_eps": 1e-5} | SHAPES[settings["shape"]]
    if params.get("use_scaled_rope"):
        params["rope_scale_factor"] = 8.0  # the only one that Meta's published code knows
    with TemporaryDirectory(prefix="benchmark-") as folder:
        job = Job(
            params=params,
            folder=Path(folder),
            dtype=settings["dtype"],
            quantize=settings["quantize"],
            compile=settings["compile"],
            rows=settings["batch"],
            length=settings["context"] + settings["prompt"] + settings["new"],
        )
        return measure(job, names, settings)


def title(settings: dict[str, Any]) -> str:
    """The settings that distinguish a run, in words."""
    parts = [settings["shape"], settings["quantize"] or settings["dtype"]]
    parts += ["compiled"] * settings["compile"]
    ordinary = {"batch": 1, "prompt": 128, "context": 0}
    parts += [f"{key} {settings[key]}" for key, n in ordinary.items() if settings[key] != n]
    return ", ".join(parts)


if __name__ == "__main__":
    run_benchmark(main, "decode")
