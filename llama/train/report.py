"""metrics.jsonl, its curves in loss.png, and TensorBoard. Knows no model.

A line is one JSON object: step, train_loss, lr, tokens_per_s, and val_loss where it was evaluated.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` if the block ends well: all of it or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with open(partial, "rb") as f:
            os.fsync(f.fileno())  # a rename may reach the disk before what was written
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; not what an interrupted write left of one."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


class Report:
    """What a run leaves behind of its losses.

    Args:
        folder: of metrics.jsonl and loss.png.
        step: lines after it are removed: a resumed run writes them again.
        tensorboard: where its files go; None is nowhere.
    """

    def __init__(self, folder: Path, step: int, tensorboard: Path | None = None):
        self.path, self.plot = folder / "metrics.jsonl", folder / "loss.png"
        self.board: Any = None
        self._said = False
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(tensorboard), purge_step=step + 1)
        kept = read_metrics(self.path) if self.path.exists() else []
        with replacing(self.path) as partial, open(partial, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(line) + "\n" for line in kept if line["step"] <= step)

    def write(self, line: dict[str, Any]) -> None:
        """Add a line."""
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
        if self.board is not None:
            for name, value in line.items():
                if name != "step":
                    self.board.add_scalar(name, value, line["step"])

    def draw(self) -> None:
        """Draw loss.png anew; without matplotlib say so, once."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            if not self._said:
                print(
                    f"{self.plot} is not drawn: that needs pip install 'llama3[train]'",
                    file=sys.stderr,
                )
            self._said = True
            return
        lines = read_metrics(self.path)
        held_out = [line for line in lines if "val_loss" in line]
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(*_curve(lines, "train_loss"), color="C0", alpha=0.3, linewidth=0.7)
        axes.plot(*_curve(_smooth(lines), "train_loss"), color="C0", label="train")
        if held_out:
            axes.plot(*_curve(held_out, "val_loss"), "o-", color="C1", label="validation")
        axes.set(xlabel="step", ylabel="loss, nats a token")
        axes.grid(alpha=0.3)
        axes.legend()
        with replacing(self.plot) as partial:
            figure.savefig(partial, format="png", dpi=120)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def check_tensorboard() -> None:
    """Raise an ImportError unless TensorBoard can be written."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as e:
        raise ImportError("--tensorboard needs a package: pip install tensorboard") from e


def _curve(lines: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    return [line["step"] for line in lines], [line[name] for line in lines]


def _smooth(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most 100 lines: each the mean of those around it."""
    width = -(-len(lines) // 100)
    groups = [lines[i : i + width] for i in range(0, len(lines), width)] if lines else []
    return [
        {
            "step": sum(line["step"] for line in group) / len(group),
            "train_loss": sum(line["train_loss"] for line in group) / len(group),
        }
        for group in groups
    ]
