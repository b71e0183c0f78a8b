"""What a benchmark prints and draws: the machine, a table, a bar chart. Measures nothing."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

# The columns of the table: heading, key of the row, format.
COLUMNS = (
    ("system", "system", "{}"),
    ("first token s", "first_token_s", "{:.3f}"),
    ("prefill tok/s", "prefill_tok_s", "{:.1f}"),
    ("decode tok/s", "decode_tok_s", "{:.2f}"),
    ("GB/s", "GB_s", "{:.1f}"),
    ("of reading", "of_read_bandwidth", "{:.2f}"),
    ("step / first's", "times_the_first", "{:.2f}"),
    ("own GiB", "own_GiB", "{:.2f}"),
    ("mapped GiB", "mapped_GiB", "{:.2f}"),
    ("cold first token s", "cold_first_token_s", "{:.2f}"),
    ("same model", "max_difference", "yes ({:.0e})"),
    ("same first id", "same_first_id", "{}"),
)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": cores,
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "command": " ".join(sys.argv[1:]),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line a row, in columns."""
    cells = [[heading for heading, _, _ in COLUMNS]]
    for row in rows:
        values = [(row[key], form) for _, key, form in COLUMNS]
        cells.append(["-" if value is None else form.format(value) for value, form in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def save_plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw decode and prefill tok/s of each row, as bars, into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.5 * len(rows)), layout="constrained")
    figure.suptitle(title)
    names = [row["system"] for row in rows]
    for axes, what in zip(figure.subplots(1, 2, sharey=True), ("decode", "prefill"), strict=True):
        bars = axes.barh(names, [row[f"{what}_tok_s"] for row in rows])
        axes.bar_label(bars, fmt="%.4g", padding=3)
        axes.margins(x=0.15)
        axes.set_xlabel(f"{what}, tokens a second")
    axes.invert_yaxis()  # shared: the first row is on top
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(partial, format="png", dpi=150)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
