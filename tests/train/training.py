"""Helpers for the tests of training: a small text, settings, flags, and a run's metrics."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from llama.train.settings import Settings

SMALL = Settings(
    dim=32, n_layers=2, n_heads=2, n_kv_heads=1, multiple_of=16, max_seq_len=16, batch_size=4,
    steps=12, warmup=2, eval_every=5, dtype="float32",
)  # fmt: skip


def write_text(path: Path, seed: int = 0) -> Path:
    """A few thousand characters of words, some beyond ASCII."""
    rng = random.Random(seed)
    words = ["the", "king", "spoke", "to", "über", "queen", "\n", "sang", "no", "日本", "more."]
    path.write_text(" ".join(rng.choice(words) for _ in range(900)), encoding="utf-8")
    return path


def flags(settings: Settings, data: Path, out: Path) -> list[str]:
    """The command line of `llama3 train` with these settings."""
    values: dict[str, Any] = {"data": data, "out": out} | vars(settings)
    return ["-m", "llama", "train"] + [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in values.items()
        if value is not None and value is not False
    ]


def losses(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without tokens_per_s."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_s"} for line in lines]


def contents(folder: Path) -> dict[str, bytes]:
    """{relative path: contents} of all files of a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
