"""Adapters that benchmarks train, and train once. Measures nothing."""

from __future__ import annotations

from pathlib import Path

from llama.train.finetune_settings import FinetuneSettings
from llama.train.finetuning import finetune


def train_once(base: Path, data: Path, out: Path, settings: FinetuneSettings) -> None:
    """Train an adapter on the CPU, unless it is complete; one that was stopped goes on."""
    done = out / "done"
    if not done.exists():
        finetune(base, [data], out, settings, resume=(out / "train").is_dir(), device="cpu")
        done.touch()
