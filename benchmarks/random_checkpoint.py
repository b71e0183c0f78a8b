"""An official-layout checkpoint of seeded random weights, for tests and benchmarks.

    python -m benchmarks.random_checkpoint --shape 1b --mp 2 --out /tmp/random-1b

A weight depends on the seed and its name only, so every --mp holds the same model.
"""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.args import ModelArgs
from llama.checkpoints import plan
from llama.checkpoints.formats.meta_export import write_meta
from llama.checkpoints.formats.vocabulary import new_folder
from llama.checkpoints.source import Source
from llama.commands.script import run_script
from llama.distributed.sharding import weight_shapes

SHAPES: dict[str, dict[str, Any]] = plan.SHAPES | {
    "135m": {"dim": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "vocab_size": 49152,
             "multiple_of": 256, "rope_theta": 100000.0},
}  # fmt: skip


class RandomSource(Source):
    """Normal weights scaled to keep activations near 1; norms are 1. Untied."""

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


def main(
    shape: str, out: str, mp: int = 1, seed: int = 0, tokenizer_path: str | None = None
) -> None:
    """Write the checkpoint.

    Args:
        shape: 135m, 1b, 3b, 8b, 70b or 405b.
        out: the folder to make.
        mp: number of shards.
        seed: of the weights.
        tokenizer_path: a tokenizer.model to put beside the weights.
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; use one of {list(SHAPES)}")
    with new_folder(Path(out)) as folder:
        write_meta(RandomSource(SHAPES[shape], seed), None, folder, torch.bfloat16, mp)
        if tokenizer_path is not None:
            shutil.copy(tokenizer_path, folder / "tokenizer.model")
    print(out)


if __name__ == "__main__":
    run_script(main, "benchmarks.random_checkpoint")
