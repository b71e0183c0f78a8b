"""Fine-tuning by `llama3 finetune`'s trainer: speed, memory, and what packing is worth.

    python -m benchmarks.finetune peft --data FILE       # beside peft and transformers
    python -m benchmarks.finetune full --data FILE       # an update of LoRA, of all weights
    python -m benchmarks.finetune memory --data FILE     # int4 and fp32 bases, peak memory
    python -m benchmarks.finetune pack --data FILE       # packed rows and single ones

FILE has samples in any format of `llama3 finetune`. What is compared alternates, an update of each,
and the order changes each time; ratios are of neighbouring updates. The first update, of the
longest rows, does not count. Prints a table and one JSON line, which --out saves.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from benchmarks.finetune_systems import Ours, Peft, Update
from benchmarks.flags import check_counts, check_file
from benchmarks.memory import high_water_mark, peak_anonymous, reset_high_water_mark, resident
from benchmarks.report import Figure, finish, make_result
from benchmarks.script import run_benchmark
from benchmarks.workers import Worker
from llama.checkpoints.demo_model import checkpoint_or_demo
from llama.layers.lora import TARGETS
from llama.train.finetune_settings import FinetuneSettings

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.03}  # absolute, of the losses of any update
SHORT = {"float32": "fp32", "bfloat16": "bf16"}


class System(Protocol):
    def update(self, step: int) -> Update: ...


def alternate(systems: Mapping[str, System], runs: int) -> dict[str, list[Update]]:
    """`runs` updates of each system, after one that does not count."""
    found: dict[str, list[Update]] = {name: [] for name in systems}
    for step in range(runs + 1):
        for name in list(systems)[:: 1 if step % 2 else -1]:
            found[name].append(systems[name].update(step))
    return {name: updates[1:] for name, updates in found.items()}


def settings_of(**options: Any) -> FinetuneSettings:
    """Settings without a held-out part."""
    return FinetuneSettings(val_fraction=0.0, epochs=100.0, **options)


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def speeds(updates: Sequence[Update]) -> list[float]:
    return [update.positions / update.seconds for update in updates]


def figures_of(found: Mapping[str, Sequence[Update]], column: str) -> list[Figure]:
    """Speed, time of an update, and last loss of each system."""
    figures = []
    for name, updates in found.items():
        figures += [
            Figure(name, column, "tok/s", speeds(updates), better="higher"),
            Figure(name, "update", "s", [u.seconds for u in updates], better="lower"),
            Figure(name, "update, CPU", "s", [u.cpu for u in updates], better="lower"),
            Figure(name, "last loss", "nat", [updates[-1].loss]),
        ]
    return figures


def peft(
    data: str,
    checkpoint: str | None = None,
    dtype: str = "float32",
    targets: str = ",".join(TARGETS),
    rank: int = 8,
    batch_size: int = 4,
    max_seq_len: int = 512,
    runs: int = 11,
    out: str | None = None,
) -> None:
    """LoRA beside peft and transformers: the same weights, rows, targets and optimizer.

    Args:
        data: a file of samples.
        checkpoint: by default the demo model.
        dtype: float32, or bfloat16: the base in bfloat16, the adapter in fp32, autocast.
        out: a JSON file to write.
    """
    check_counts(runs=runs, batch_size=batch_size, rank=rank)
    check_file("out", out, ".json")
    settings = settings_of(
        dtype=dtype, targets=targets, rank=rank, batch_size=batch_size, max_seq_len=max_seq_len
    )
    ours = Ours(folder_of(checkpoint), [data], settings)
    found = alternate({"llama3": ours, "peft": Peft(ours)}, runs)
    worst = max(abs(a.loss - b.loss) for a, b in zip(found["llama3"], found["peft"], strict=True))
    if not worst <= TOLERANCE[settings.dtype or dtype]:  # also true of NaN
        raise ValueError(f"the losses differ by {worst}: {found}")
    figures = figures_of(found, "LoRA")
    compared = ratios(speeds(found["llama3"]), speeds(found["peft"]))
    figures.append(Figure("llama3 / peft", "LoRA", "", compared, better="higher"))
    cpu = ratios([u.cpu for u in found["peft"]], [u.cpu for u in found["llama3"]])
    figures.append(Figure("llama3 / peft", "speed by CPU time", "", cpu, better="higher"))
    name = f"finetune peft, {SHORT[dtype]}, {targets}"
    report(name, settings, {"runs": runs, "largest difference of losses": worst}, figures, out)


def full(
    data: str,
    checkpoint: str | None = None,
    dtype: str = "float32",
    batch_size: int = 4,
    max_seq_len: int = 512,
    runs: int = 7,
    out: str | None = None,
) -> None:
    """An update of LoRA on all linears, and of all weights, on the same rows.

    Args:
        data, checkpoint, dtype, out: as in `peft`.
    """
    check_counts(runs=runs, batch_size=batch_size)
    check_file("out", out, ".json")
    options = {"dtype": dtype, "batch_size": batch_size, "max_seq_len": max_seq_len}
    settings = {name: settings_of(method=name, **options) for name in ("lora", "full")}
    folder = folder_of(checkpoint)
    found = alternate({name: Ours(folder, [data], s) for name, s in settings.items()}, runs)
    seconds = {name: [update.seconds for update in updates] for name, updates in found.items()}
    figures = figures_of(found, "training")
    compared = ratios(seconds["lora"], seconds["full"])
    figures.append(Figure("lora / full", "update", "", compared, better="lower"))
    cpu = ratios([u.cpu for u in found["lora"]], [u.cpu for u in found["full"]])
    figures.append(Figure("lora / full", "update, CPU", "", cpu, better="lower"))
    report(f"finetune full, {SHORT[dtype]}", settings["lora"], {"runs": runs}, figures, out)


class Measured:
    """A trainer in a process of its own, whose memory is measured."""

    def __init__(self, checkpoint: str, data: str, settings: FinetuneSettings):
        self.arguments = checkpoint, [data], settings

    def run(self, updates: int) -> dict[str, float]:
        """Load and make updates: GiB at the highest, above what the imports took."""
        before, anonymous = resident(), dict[str, float]()
        reset_high_water_mark()
        with peak_anonymous(anonymous):
            system = Ours(*self.arguments)
            for step in range(updates):
                system.update(step)
        return {"resident": (high_water_mark() - before) / 2**30} | anonymous


def memory(
    data: str,
    checkpoint: str | None = None,
    dtype: str = "float32",
    int4_dtype: str = "bfloat16",
    batch_size: int = 1,
    max_seq_len: int = 512,
    recompute: bool = True,
    updates: int = 2,
    runs: int = 3,
    out: str | None = None,
) -> None:
    """Peak memory of LoRA on a base in 4 bits and in `dtype`: loading it, and `updates` updates.

    Each run is a process. "resident" is the high-water mark of its resident memory (VmHWM, reset
    before the checkpoint is opened) less the resident memory after all imports; the pages of the
    checkpoint's mapped file count. "anonymous" leaves those out, sampled every 5 ms.

    Args:
        data, checkpoint, dtype, out: as in `peft`.
        int4_dtype: of matmuls and of the embedding beside the base in 4 bits.
        recompute: keep no activations of a layer.
    """
    check_counts(runs=runs, batch_size=batch_size, updates=updates)
    check_file("out", out, ".json")
    folder = folder_of(checkpoint)
    options = {"recompute": recompute, "batch_size": batch_size, "max_seq_len": max_seq_len}
    systems = {
        "int4": settings_of(quantize="int4", dtype=int4_dtype, **options),
        SHORT[dtype]: settings_of(dtype=dtype, **options),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    for run in range(runs):
        for name in list(systems)[:: 1 if run % 2 else -1]:
            with Worker(name, Measured, folder, data, systems[name]) as worker:
                found[name].append(worker.call("run", updates))
    figures, peaks = [], {}
    for column, key in (("resident", "resident"), ("anonymous", "peak_GiB")):
        for name, values in found.items():
            peaks[name] = [value[key] for value in values]
            figures.append(Figure(name, column, "GiB", peaks[name], better="lower"))
        compared = ratios(peaks["int4"], peaks[SHORT[dtype]])
        figures.append(Figure(f"int4 / {SHORT[dtype]}", column, "", compared, better="lower"))
    name = (
        f"finetune memory, int4 in {SHORT[int4_dtype]}, {SHORT[dtype]}{', recompute' * recompute}"
    )
    report(name, systems["int4"], {"runs": runs, "updates": updates}, figures, out)


def pack(
    data: str,
    checkpoint: str | None = None,
    dtype: str = "float32",
    batch_size: int = 16,
    max_seq_len: int = 512,
    packed_rows: int = 8,
    runs: int = 7,
    out: str | None = None,
) -> None:
    """LoRA on single rows, padded to the longest of their batch, and on packed ones.

    Args:
        data, checkpoint, dtype, out: as in `peft`.
        batch_size: single rows of an update.
        packed_rows: rows of max_seq_len tokens of an update of packed samples.
    """
    check_counts(runs=runs, batch_size=batch_size, packed_rows=packed_rows)
    check_file("out", out, ".json")
    folder = folder_of(checkpoint)
    options = {"dtype": dtype, "max_seq_len": max_seq_len}
    systems = {
        "packed": settings_of(pack=True, batch_size=packed_rows, **options),
        "single rows": settings_of(batch_size=batch_size, **options),
    }
    found = alternate({name: Ours(folder, [data], s) for name, s in systems.items()}, runs)
    rates = {name: [u.targets / u.seconds for u in updates] for name, updates in found.items()}
    figures = figures_of(found, "positions")
    figures += [
        Figure(name, "targets", "target tok/s", values, better="higher")
        for name, values in rates.items()
    ]
    medians = [statistics.median(rates[name]) for name in systems]
    figures.append(
        Figure("packed / single", "targets", "", [medians[0] / medians[1]], better="higher")
    )
    more = {"runs": runs, "packed_rows": packed_rows}
    report(f"finetune pack, {SHORT[dtype]}", systems["single rows"], more, figures, out)


def folder_of(checkpoint: str | None) -> str:
    """The folder of a checkpoint, by default the demo model's."""
    folder, _ = checkpoint_or_demo(checkpoint, None)
    return str(folder)


def report(
    name: str,
    settings: FinetuneSettings,
    more: Mapping[str, Any],
    figures: Sequence[Figure],
    out: str | None,
) -> None:
    finish(make_result(name, asdict(settings) | dict(more), figures), out)


if __name__ == "__main__":
    run_benchmark({"peft": peft, "full": full, "memory": memory, "pack": pack}, "finetune")
