"""`Settings`: what a training run is asked to do. Knows nothing about tensors or files."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from llama.model import ModelArgs

DTYPES = ("float32", "bfloat16")
PARALLEL = ("ddp", "fsdp")
# What changes neither the model nor its data, so that a run may go on with another value. More
# steps stretch the schedule of the learning rate.
MAY_CHANGE = {"steps", "eval_every", "eval_windows", "recompute", "parallel", "prompt"}


@dataclass(frozen=True)
class Settings:
    """The sizes of a model, and how it is trained; the flags of `llama3 train` say more.

    Raises:
        ValueError: they make no model, or no training.
    """

    dim: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None  # None: as many as n_heads
    multiple_of: int = 256
    rope_theta: float | None = None  # None: 16 for each position
    max_seq_len: int = 64
    tokenizer: str = "char"
    val_fraction: float = 0.1
    test_fraction: float = 0.0
    batch_size: int = 12
    accumulate: int = 1
    steps: int = 2000
    lr: float | None = None  # None: see `peak_lr`
    final_lr: float = 0.0
    warmup: int = 100
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    seed: int = 1
    eval_every: int = 250
    eval_windows: int = 2048
    dtype: str | None = None  # None: bfloat16 where the device computes in it
    recompute: bool = False
    parallel: str | None = None
    prompt: str | None = None

    def __post_init__(self) -> None:
        positive = (
            "max_seq_len",
            "batch_size",
            "accumulate",
            "steps",
            "eval_every",
            "eval_windows",
        )
        for name in positive:
            self._check(name, int, lambda n: n >= 1, "a positive integer")
        for name in ("warmup", "seed"):
            self._check(name, int, lambda n: n >= 0, "an integer from 0 on")
        for name in ("val_fraction", "test_fraction", "beta1", "beta2"):
            self._check(name, float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
        self._check("final_lr", float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
        for name in ("weight_decay", "grad_clip"):
            self._check(name, float, lambda x: 0 <= x < math.inf, "a number from 0 on")
        if self.lr is not None:
            self._check("lr", float, lambda x: 0 < x < math.inf, "a positive number")
        self._check("recompute", bool, lambda _: True, "of type bool")
        for name, known in (("dtype", DTYPES), ("parallel", PARALLEL)):
            if getattr(self, name) not in (None, *known):
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; use one of {known}")
        self.model_args(vocab_size=1)

    def _check(self, name: str, kind: type, fits: Any, wanted: str) -> None:
        value = getattr(self, name)
        kinds = (int, float) if kind is float else (kind,)
        if type(value) not in kinds or not fits(value):
            raise ValueError(f"{name} must be {wanted}, not {value!r}")

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up. Without a given one it falls as the width grows."""
        return 0.4 / self.dim if self.lr is None else self.lr

    def lr_at(self, step: int) -> float:
        """Of the update after `step` others: up in a line, then down half a cosine to `final_lr`.

        `final_lr` is a part of the peak; arXiv:1608.03983 without restarts.
        """
        warmup = min(self.warmup, self.steps // 2)
        if step < warmup:
            return self.peak_lr * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        cosine = (1 + math.cos(math.pi * min(done, 1.0))) / 2
        return self.peak_lr * (self.final_lr + (1 - self.final_lr) * cosine)

    def model_args(self, vocab_size: int) -> ModelArgs:
        """The sizes of the model; one row of `max_seq_len` to generate."""
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "rope_theta")
        sizes = {name: getattr(self, name) for name in (*names, "max_seq_len")}
        if self.rope_theta is None:  # Llama 3's 500000 is for thousands of positions
            sizes["rope_theta"] = 16.0 * self.max_seq_len
        return ModelArgs(vocab_size=vocab_size, max_batch_size=1, **sizes)

    def differences(self, other: dict[str, Any], ranks: int) -> list[str]:
        """Why a run with `other` settings and ranks cannot go on with these, each as a text."""
        mine = dataclasses.asdict(self) | {"ranks": ranks}
        return [
            f"{name} was {other.get(name)} and is now {value}"
            for name, value in mine.items()
            if name not in MAY_CHANGE and other.get(name) != value
        ]
