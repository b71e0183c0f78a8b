"""Options of a training run. Knows nothing about tensors or files."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from llama.common.dtypes import SHORT_NAMES
from llama.common.options import option
from llama.model import ModelArgs

DTYPES = ("float32", "bfloat16")  # to compute in; trained weights are float32
PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class TrainerSettings:
    """What the trainer is told, whatever it trains. Subclasses add `steps` and what is trained.

    Attributes:
        may_change: fields that change neither the model nor its data: a run may be resumed with
            other values. More steps stretch the schedule of the learning rate.

    Raises:
        ValueError: a value is out of range.
    """

    batch_size: int = option(12, "rows that each process computes at once")
    accumulate: int = option(1, "batches that make one update")
    lr: float | None = option(None, "the highest learning rate")
    final_lr: float = option(0.0, "learning rate of the last update, as a part of lr, from 0 to 1")
    warmup: int = option(100, "updates until lr is reached, at most half of steps")
    beta1: float = option(0.9, "AdamW's decay of the mean of the gradients")
    beta2: float = option(0.99, "AdamW's decay of the mean of the squared gradients")
    weight_decay: float = option(0.1, "AdamW's weight decay")
    grad_clip: float = option(1.0, "gradients are scaled down to this norm; 0 is no limit")
    seed: int = option(1, "of the first weights and of the order of the rows")
    eval_every: int = option(250, "updates between evaluations, which also save and print a sample")
    eval_windows: int = option(2048, "rows of validation text to evaluate, at most")
    dtype: str | None = option(
        None, "float32, or bfloat16 for matmuls; by default bfloat16 where the device has it"
    )
    recompute: bool = option(
        False, "compute activations twice instead of keeping them: slower, less memory"
    )
    parallel: str | None = option(
        None, "ddp or fsdp, under torchrun: each process trains on rows of its own"
    )

    may_change: ClassVar[frozenset[str]] = frozenset(
        {"steps", "eval_every", "eval_windows", "recompute", "parallel"}
    )

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "eval_every", "eval_windows"):
            self.check(name, int, lambda n: n >= 1, "a positive integer")
        for name in ("warmup", "seed"):
            self.check(name, int, lambda n: n >= 0, "an integer from 0 on")
        for name in ("beta1", "beta2"):
            self.check(name, float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
        self.check("final_lr", float, lambda x: 0 <= x <= 1, "a number from 0 to 1")
        for name in ("weight_decay", "grad_clip"):
            self.check(name, float, lambda x: 0 <= x < math.inf, "a number from 0 on")
        if self.lr is not None:
            self.check("lr", float, lambda x: 0 < x < math.inf, "a positive number")
        self.check("recompute", bool, lambda _: True, "of type bool")
        dtype = SHORT_NAMES.get(str(self.dtype), self.dtype)
        object.__setattr__(self, "dtype", None if dtype == "auto" else dtype)
        for name, known in (("dtype", DTYPES), ("parallel", PARALLEL)):
            if getattr(self, name) not in (None, *known):
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; use one of {known}")

    def check(self, name: str, kind: type, is_valid: Any, wanted: str) -> None:
        """Raise a ValueError unless the field `name` is of type `kind` and `is_valid`."""
        value = getattr(self, name)
        kinds = (int, float) if kind is float else (kind,)
        if type(value) not in kinds or not is_valid(value):
            raise ValueError(f"{name} must be {wanted}, not {value!r}")

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up. A subclass where `lr` may be None has its own."""
        assert self.lr is not None, "a subclass says what None means"
        return self.lr

    def scheduled_lr(self, step: int, steps: int) -> float:
        """The learning rate of update `step` of `steps`, counted from 0.

        A linear warm-up, then half a cosine from the peak down to `final_lr` times the peak, which
        the last update has: arXiv:1608.03983 without restarts. A single update has the peak.
        """
        warmup, last = min(self.warmup, steps // 2), steps - 1
        if step < warmup:
            return self.peak_lr * (step + 1) / warmup
        done = 1.0 if step >= last > 0 else (step - warmup) / max(1, last - warmup)
        cosine = (1 + math.cos(math.pi * done)) / 2
        return self.peak_lr * (self.final_lr + (1 - self.final_lr) * cosine)

    def differences(self, other: dict[str, Any], ranks: int) -> list[str]:
        """Each field that keeps a run with `other` settings from being resumed with these."""
        current = dataclasses.asdict(self) | {"ranks": ranks}
        return [
            f"{name} was {other.get(name)} and is now {value}"
            for name, value in current.items()
            if name not in self.may_change and other.get(name) != value
        ]


@dataclass(frozen=True)
class Settings(TrainerSettings):
    """The sizes of a model and how it is trained: the flags of `llama3 train`.

    Raises:
        ValueError: a value is out of range, or the sizes do not fit together.
    """

    dim: int = option(128, "width of the model")
    n_layers: int = option(4, "transformer blocks")
    n_heads: int = option(4, "attention heads of each block")
    n_kv_heads: int | None = option(None, "heads of keys and values; by default as n_heads")
    multiple_of: int = option(
        256, "the feed-forward, 8/3 of dim wide, is rounded up to a multiple of this"
    )
    rope_theta: float | None = option(
        None, "base of the rotary frequencies; by default 16 * max_seq_len"
    )
    max_seq_len: int = option(64, "tokens of a row; the model cannot read longer texts")
    tokenizer: str = option(
        "char", "char, bpe:N (N tokens, learnt from the text), or a tokenizer.model"
    )
    val_fraction: float = option(
        0.1, "part of each file, at its end, for validation: it measures the loss"
    )
    test_fraction: float = option(0.0, "part of each file, after that, which is not used at all")
    steps: int = option(2000, "updates")
    lr: float | None = option(None, "the highest learning rate; by default 0.4 / dim")
    prompt: str | None = option(
        None, "text that samples continue; by default the validation text's first token"
    )

    may_change: ClassVar[frozenset[str]] = TrainerSettings.may_change | {"prompt"}

    def __post_init__(self) -> None:
        for name in ("max_seq_len", "steps"):
            self.check(name, int, lambda n: n >= 1, "a positive integer")
        for name in ("val_fraction", "test_fraction"):
            self.check(name, float, lambda x: 0 <= x < 1, "a number from 0 to below 1")
        super().__post_init__()
        self.model_args(vocab_size=1)

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up; by default inversely proportional to the width."""
        return 0.4 / self.dim if self.lr is None else self.lr

    def lr_at(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0; see `scheduled_lr`."""
        return self.scheduled_lr(step, self.steps)

    def model_args(self, vocab_size: int) -> ModelArgs:
        """The sizes of the model, with a cache of one row for samples."""
        names = ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "rope_theta")
        sizes = {name: getattr(self, name) for name in (*names, "max_seq_len")}
        if self.rope_theta is None:  # Llama 3's 500000 is for thousands of positions
            sizes["rope_theta"] = 16.0 * self.max_seq_len
        return ModelArgs(vocab_size=vocab_size, max_batch_size=1, **sizes)
