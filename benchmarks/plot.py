"""Bar chart of the systems that `benchmarks.decode` compares. Needs matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import Figure


def save_plot(figures: Sequence[Figure], path: Path, title: str) -> None:
    """Draw each system's median tokens per second of decode and prefill into a PNG file."""
    from matplotlib.figure import Figure as Canvas

    systems = list(dict.fromkeys(figure.row for figure in figures))
    canvas = Canvas(figsize=(10, 1.2 + 0.5 * len(systems)), layout="constrained")
    canvas.suptitle(title)
    medians = {(figure.row, figure.column): figure.median for figure in figures}
    for axes, what in zip(canvas.subplots(1, 2, sharey=True), ("decode", "prefill"), strict=True):
        bars = axes.barh(systems, [medians[system, what] for system in systems])
        axes.bar_label(bars, fmt="%.4g", padding=3)
        axes.margins(x=0.15)
        axes.set_xlabel(f"{what}, tokens per second")
    axes.invert_yaxis()  # shared by both: the first system is on top
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        canvas.savefig(partial, format="png", dpi=150)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
