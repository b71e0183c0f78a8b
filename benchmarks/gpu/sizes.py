"""What `benchmarks.gpu` measures: the real sizes, and those of a rehearsal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.random_checkpoint import SHAPES


@dataclass(frozen=True)
class Sizes:
    """Attributes:
    shape, train_shape: sizes of the models.
    matrix, copied: side of the matrices and bytes, of the ceilings.
    rows, contexts, steps: of decoding. A step is measured `steps` times.
    prompts, chunks: lengths, and parts in which they are computed too, of prefill.
    requests, slots, prompt_lengths, answer_lengths: of the engine.
    train_rows, train_length: of the training step; the first number of rows that fits is used.
    copies: layers of the model whose linears are timed alone.
    tests: more arguments of pytest.
    """

    rehearsal: bool
    shape: dict[str, Any]
    train_shape: dict[str, Any]
    matrix: int
    copied: int
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int
    prompts: tuple[int, ...]
    chunks: tuple[int, ...]
    requests: int
    slots: int
    prompt_lengths: tuple[int, int]
    answer_lengths: tuple[int, int]
    train_rows: tuple[int, ...]
    train_length: int
    copies: int
    tests: tuple[str, ...] = ()


REAL = Sizes(
    rehearsal=False,
    shape=SHAPES["8b"],
    train_shape=SHAPES["1b"],
    matrix=8192,
    copied=4 << 30,
    rows=(1, 8, 32),
    contexts=(128, 4096),
    steps=40,
    prompts=(512, 4096),
    chunks=(2048, 512),
    requests=64,
    slots=32,
    prompt_lengths=(32, 1024),
    answer_lengths=(32, 256),
    train_rows=(8, 4, 2, 1),
    train_length=2048,
    copies=16,
)
TINY: dict[str, Any] = {"dim": 128, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1}
TINY |= {"vocab_size": 512, "multiple_of": 64, "use_scaled_rope": True}
REHEARSAL = Sizes(
    rehearsal=True,
    shape=TINY,
    train_shape=TINY,
    matrix=64,
    copied=1 << 20,
    rows=(1, 3),
    contexts=(16, 64),
    steps=5,
    prompts=(16, 64),
    chunks=(16,),
    requests=4,
    slots=2,
    prompt_lengths=(4, 20),
    answer_lengths=(2, 5),
    train_rows=(2, 1),
    train_length=16,
    copies=2,
    tests=("-k", "plain_path and int8"),
)
