"""An official-layout checkpoint of seeded random weights, for tests and benchmarks.

    python -m benchmarks.random_checkpoint --shape 1b --mp 2 --out /tmp/random-1b

A weight depends on the seed and its name only, so the model does not depend on --mp.
"""

from __future__ import annotations

import base64
import itertools
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.script import run_benchmark
from llama.checkpoints.formats.meta_export import write_meta
from llama.checkpoints.source import Source
from llama.common.files import new_folder
from llama.distributed.sharding import weight_shapes
from llama.model import ModelArgs

SPECIAL_TOKENS = 256  # that a tokenizer adds to the ranks of its file
LLAMA3: dict[str, Any] = {"n_kv_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0}
# params.json of the releases from 3.1 on.
SHAPES: dict[str, dict[str, Any]] = {
    "1b": LLAMA3 | {"dim": 2048, "n_layers": 16, "n_heads": 32, "ffn_dim_multiplier": 1.5,
                    "multiple_of": 256, "use_scaled_rope": True},
    "3b": LLAMA3 | {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0,
                    "multiple_of": 256, "use_scaled_rope": True},
    "8b": LLAMA3 | {"dim": 4096, "n_layers": 32, "n_heads": 32, "ffn_dim_multiplier": 1.3,
                    "multiple_of": 1024, "use_scaled_rope": True},
    "70b": LLAMA3 | {"dim": 8192, "n_layers": 80, "n_heads": 64, "ffn_dim_multiplier": 1.3,
                     "multiple_of": 4096, "use_scaled_rope": True},
    "405b": LLAMA3 | {"dim": 16384, "n_layers": 126, "n_heads": 128, "ffn_dim_multiplier": 1.2,
                      "multiple_of": 4096, "use_scaled_rope": True},
    "135m": {"dim": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "vocab_size": 49152,
             "multiple_of": 256, "rope_theta": 100000.0},
}  # fmt: skip


class RandomSource(Source):
    """Normal weights scaled to keep activations near 1; norms are 1. The output is not tied."""

    layout = "meta"

    def __init__(self, params: dict[str, Any], seed: int = 0):
        self.path = Path("random weights")
        self.params = {"norm_eps": 1e-5} | params
        self.seed = seed
        self.sizes = weight_shapes(ModelArgs(**self.params))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.sizes

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        shape = self.sizes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(self.seed + zlib.crc32(name.encode()))
        whole = torch.empty(shape, dtype=torch.bfloat16)
        whole.normal_(0, shape[1] ** -0.5, generator=generator)
        return whole[start:stop] if dim == 0 else whole[:, start:stop]


def write_rank_file(path: Path, vocab_size: int, letters: Sequence[int] = range(256)) -> None:
    """Write a tokenizer.model of `vocab_size` tokens, special ones included, that mean nothing.

    Its tokens are all bytes, then all strings of letters, the shortest first.

    Args:
        letters: bytes; with those of ASCII almost every token is a text of its own.
    """
    longer = (itertools.product(letters, repeat=n) for n in itertools.count(2))
    lengths = itertools.chain([itertools.product(range(256))], longer)
    tokens = itertools.islice(itertools.chain.from_iterable(lengths), vocab_size - SPECIAL_TOKENS)
    lines = (f"{base64.b64encode(bytes(t)).decode()} {rank}\n" for rank, t in enumerate(tokens))
    path.write_text("".join(lines), encoding="ascii")


def main(
    shape: str, out: str, mp: int = 1, seed: int = 0, tokenizer_path: str | None = None
) -> None:
    """Write the checkpoint.

    Args:
        shape: 135m, 1b, 3b, 8b, 70b or 405b.
        out: the folder to create.
        mp: number of shards.
        seed: of the weights.
        tokenizer_path: a tokenizer.model to copy beside the weights.
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; use one of {list(SHAPES)}")
    with new_folder(Path(out)) as folder:
        write_meta(RandomSource(SHAPES[shape], seed), None, folder, torch.bfloat16, mp=mp)
        if tokenizer_path is not None:
            shutil.copy(tokenizer_path, folder / "tokenizer.model")
    print(out)


if __name__ == "__main__":
    run_benchmark(main, "random_checkpoint")
