"""Prefill and decode beside other systems, with the same random weights, alternately in one run.

    python -m benchmarks.decode --shape 1b --prompt 128 --new 32 --peers reference,transformers
    python -m benchmarks.decode --shape 1b --quantize int8 --peers llama.cpp,bf16
    python -m benchmarks.decode --shape 135m --batch 8 --prompt 512 --plot decode.png

Prints a table, then one JSON line. docs/performance.md says how to install the peers and what the
columns mean. Each system has a process of its own, and only one runs at a time.
"""

from __future__ import annotations

import json
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.flags import check_counts, check_model
from benchmarks.generation import peak_anonymous, random_prompts
from benchmarks.load import anonymous_bytes, resident_bytes
from benchmarks.peers import OURS, Job, check_peers, make
from benchmarks.random_checkpoint import SHAPES
from benchmarks.report import machine, print_table, save_plot
from benchmarks.same_model import Preparation
from benchmarks.workers import Reader, Worker
from llama.commands.script import run_script

READ_BYTES = 1 << 30  # of the memory whose reading is timed


class Measured:
    """A system with its prompts, as an object for a `Worker`."""

    def __init__(self, name: str, job: Job, context: int, prompt: int):
        self.system = make(name, job)
        ids = random_prompts(job.params["vocab_size"], [context + prompt] * job.rows)
        self.context = [row[:context] for row in ids]
        self.prompts = [row[context:] for row in ids]

    def warm(self, new: int) -> dict[str, Any]:
        """Fill the cache; a round that does not count; what is known of the system then."""
        found: dict[str, Any] = {
            "weight_bytes": self.system.weight_bytes,
            "position_bytes": self.system.position_bytes,
        }
        try:
            before = anonymous_bytes()
        except OSError:  # not Linux
            self._warm(found, new)
            return found | {"own_GiB": None, "mapped_GiB": None}
        peak: dict[str, float] = {}
        with peak_anonymous(peak):
            self._warm(found, new)
        found["own_GiB"] = before / 2**30 + peak["peak_GiB"]
        found["mapped_GiB"] = resident_bytes("RssFile") / 2**30
        return found

    def _warm(self, found: dict[str, Any], new: int) -> None:
        start = time.perf_counter()
        if self.context[0]:
            self.system.fill(self.context)
        filled = time.perf_counter() - start
        found["cold_first_token_s"] = filled + self.system.generate(self.prompts, new)[1]

    def round(self, new: int) -> tuple[list[list[int]], float, float]:
        """As `System.generate`."""
        return self.system.generate(self.prompts, new)


@dataclass
class Run:
    """A system's process, and what was measured of it so far."""

    name: str
    worker: Worker
    known: dict[str, Any] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)  # seconds to the first token
    step: list[float] = field(default_factory=list)  # seconds a decode step
    first_ids: list[int] = field(default_factory=list)

    def measure(self, new: int) -> None:
        ids, first, others = self.worker.call("round", new)
        self.first.append(first)
        self.step.append(others / (new - 1))
        self.first_ids = [row[0] for row in ids]


def measure(job: Job, names: list[str], options: dict[str, int]) -> dict[str, Any]:
    """Prepare, warm, then measure all systems in turn: the rows of the table, and the bandwidth."""
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
            run.known = run.worker.call("warm", new)
        reads = [reader.call("read")]
        for _ in range(options["runs"]):
            for run in runs:
                run.measure(new)
            reads.append(reader.call("read"))
    bandwidth = statistics.median(reads)
    rows = [row(run, runs[0], job, options, bandwidth) for run in runs]
    for found, run in zip(rows, runs, strict=True):
        found["max_difference"] = differences[run.name]
    return {"read_GB_s": bandwidth / 1e9, "read_GB_s_each": [n / 1e9 for n in reads], "rows": rows}


def row(run: Run, ours: Run, job: Job, options: dict[str, int], bandwidth: float) -> dict[str, Any]:
    """A line of the table: medians of the rounds."""
    first, step = statistics.median(run.first), statistics.median(run.step)
    # A step reads the weights once, and each row's cache as far as it is filled half-way.
    filled = options["context"] + options["prompt"] + options["new"] / 2
    size = run.known["weight_bytes"] + job.rows * filled * run.known["position_bytes"]
    pairs = zip(run.first_ids, ours.first_ids, strict=True)
    return {
        "system": job.title(run.name),
        "first_token_s": first,
        "prefill_tok_s": job.rows * options["prompt"] / first,
        "decode_tok_s": job.rows / step,
        "GB_s": size / step / 1e9,
        "of_read_bandwidth": size / step / bandwidth,
        "times_the_first": step / statistics.median(ours.step),
        "own_GiB": run.known["own_GiB"],
        "mapped_GiB": run.known["mapped_GiB"],
        "cold_first_token_s": run.known["cold_first_token_s"],
        "same_first_id": sum(a == b for a, b in pairs),
        "weight_bytes": run.known["weight_bytes"],
        "first_token_s_each": run.first,
        "step_s_each": run.step,
    }


def warn_of_memory(folder: Path) -> None:
    """Say so if the weights do not fit into memory together: some would be read from the disk."""
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return
    [free] = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    if size > free:
        print(
            f"the files of weights have {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are "
            "free: what is timed may be the disk; take fewer peers"
        )


def check(shape: str, dtype: str, quantize: str | None, compile: bool, plot: str | None) -> None:
    """Raise a ValueError or ImportError for what cannot be measured, before anything is written."""
    check_model(shape, dtype, quantize)
    if plot is not None:
        if find_spec("matplotlib") is None:
            raise ImportError("--plot needs matplotlib: pip install 'llama3[bench]'")
        if Path(plot).suffix != ".png" or not Path(plot).absolute().parent.is_dir():
            raise ValueError(f"--plot {plot!r} must name a .png file in a folder that is there")


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
) -> None:
    """Measure and print.

    Args:
        shape: 135m, 1b, 3b or 8b.
        dtype: bfloat16, float16 or float32.
        quantize: int8 or int4: this library's weights, and llama.cpp's (Q8_0, Q4_0).
        compile: this library's compiled path.
        batch: prompts at once.
        prompt: tokens of each prompt.
        context: tokens that are cached before each prompt, computed before the timing.
        new: tokens that follow each prompt.
        runs: rounds of which the median counts.
        peers: of reference, transformers, llama.cpp, llama.cpp-bf16 (not quantized), exact (this
            library built so), bf16 (this library, neither quantized nor compiled); with commas.
        plot: a PNG file to draw.
    """
    options = {"batch": batch, "prompt": prompt, "context": context, "new": new, "runs": runs}
    names = [name for name in peers.split(",") if name]
    check(shape, dtype, quantize, compile, plot)
    check_counts(**options)
    check_peers(names)
    params = {"norm_eps": 1e-5} | SHAPES[shape]
    if params.get("use_scaled_rope"):
        params["rope_scale_factor"] = 8.0  # the only one that Meta's published code knows
    start = {"date": time.strftime("%Y-%m-%d %H:%M"), "machine": machine()}
    print(", ".join(f"{name} {value}" for name, value in start["machine"].items()), flush=True)
    with TemporaryDirectory(prefix="benchmark-") as folder:
        length = context + prompt + new
        job = Job(params, Path(folder), dtype, quantize, compile, batch, length)
        found = measure(job, names, options)
    print_table(found["rows"])
    print(f"reading memory: {found['read_GB_s']:.1f} GB/s")
    setting = {"shape": shape, "dtype": dtype, "quantize": quantize, "compile": compile, **options}
    if plot is not None:
        title = ", ".join(f"{name} {value}" for name, value in setting.items() if value)
        save_plot(found["rows"], Path(plot), title)
    print(json.dumps({**start, **setting, **found}))


if __name__ == "__main__":
    run_script(main, "benchmarks.decode")
