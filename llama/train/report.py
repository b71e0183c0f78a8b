"""Metrics of a training run: metrics.jsonl, loss.png, TensorBoard. Knows nothing about models.

A line of metrics.jsonl is a JSON object of step, train_loss, lr and tokens_per_s, and val_loss at
evaluations. Step 0, before the first update, has val_loss alone.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from llama.common.extras import install_line
from llama.common.files import replacing_file

logger = logging.getLogger("llama")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without a last line that an interrupted write cut off."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            names = ("step", "train_loss") if line["step"] else ("step", "val_loss")
            lines.append(line | {name: line[name] + 0 for name in names})
        except (ValueError, TypeError, LookupError, RecursionError):
            break
    return lines


class Report:
    """Writes the metrics of a run.

    Args:
        folder: where metrics.jsonl and loss.png go.
        step: the step from which the run continues; later lines are removed.
        tensorboard: folder of the TensorBoard files; None writes none.
    """

    def __init__(self, folder: Path, step: int, tensorboard: Path | None = None):
        self.path, self.plot = folder / "metrics.jsonl", folder / "loss.png"
        self.board: Any = None
        self._warned = False  # that matplotlib is missing
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(tensorboard), purge_step=step + 1)
        lines = read_metrics(self.path) if self.path.exists() else []
        with replacing_file(self.path) as partial, open(partial, "w", encoding="utf-8") as f:
            kept = [line for line in lines if step and line["step"] <= step]
            f.writelines(json.dumps(line) + "\n" for line in kept)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
        if self.board is not None:
            for name, value in line.items():
                if name != "step":
                    self.board.add_scalar(name, value, line["step"])

    def draw(self) -> None:
        """Draw loss.png again. Without matplotlib, log that once."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            if not self._warned:
                logger.info("%s is not drawn; to draw it: %s", self.plot, install_line("train"))
            self._warned = True
            return
        lines = read_metrics(self.path)
        evaluated = [line for line in lines if "val_loss" in line]
        lines = [line for line in lines if "train_loss" in line]
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(*_columns(lines, "train_loss"), color="C0", alpha=0.3, linewidth=0.7)
        axes.plot(*_columns(_smooth(lines), "train_loss"), color="C0", label="train")
        if evaluated:
            axes.plot(*_columns(evaluated, "val_loss"), "o-", color="C1", label="validation")
        axes.set(xlabel="step", ylabel="loss, nats per token")
        axes.grid(alpha=0.3)
        axes.legend()
        with replacing_file(self.plot) as partial:
            figure.savefig(partial, format="png", dpi=120)

    def close(self) -> None:
        """Close the TensorBoard files."""
        if self.board is not None:
            self.board.close()


def check_tensorboard() -> None:
    """Raise an ImportError if the tensorboard package is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as e:
        raise ImportError("--tensorboard needs a package: pip install tensorboard") from e


def _columns(lines: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """The steps, and the values of `name`."""
    return [line["step"] for line in lines], [line[name] for line in lines]


def _smooth(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most 100 lines, each the mean of consecutive ones."""
    width = -(-len(lines) // 100)
    groups = [lines[i : i + width] for i in range(0, len(lines), width)] if lines else []
    return [
        {
            "step": sum(line["step"] for line in group) / len(group),
            "train_loss": sum(line["train_loss"] for line in group) / len(group),
        }
        for group in groups
    ]
