"""inspect.py: sizes of the published models and of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.checkpoints.inspect import cache_bytes, describe, parameter_count, rank_bytes
from llama.checkpoints.source import Source
from llama.distributed.sharding import rank_counts, weight_shapes
from llama.model import ModelArgs

COMMON = {"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 500000.0}
# Release: params.json, tied, number of parameters, bytes of KV cache per token.
RELEASES: dict[str, tuple[dict[str, Any], bool, int, int]] = {
    "3 8B": (
        {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024},
        False, 8_030_261_248, 131_072,
    ),
    "3 70B": (
        {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096},
        False, 70_553_706_496, 327_680,
    ),
    "3.1 405B": (
        {"dim": 16384, "n_layers": 126, "n_heads": 128, "multiple_of": 4096},
        False, 405_853_388_800, 516_096,
    ),
    "3.2 1B": (
        {"dim": 2048, "n_layers": 16, "n_heads": 32, "multiple_of": 256},
        True, 1_235_814_400, 32_768,
    ),
    "3.2 3B": (
        {"dim": 3072, "n_layers": 28, "n_heads": 24, "multiple_of": 256},
        True, 3_212_749_824, 114_688,
    ),
}  # fmt: skip
MULTIPLIERS = {"3 8B": 1.3, "3 70B": 1.3, "3.1 405B": 1.2, "3.2 1B": 1.5, "3.2 3B": 1.0}
SMALL = {"vocab_size": 300, "n_kv_heads": 2}


class Sizes(Source):
    """A checkpoint with sizes and no weights."""

    def __init__(self, params: dict[str, Any], tied: bool = False, layout: str = "meta"):
        self.path, self.params, self.tied, self.layout = Path("sizes"), params, tied, layout
        self.norms = torch.bfloat16

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return weight_shapes(ModelArgs(**self.params))

    def dtype(self, name: str) -> torch.dtype:
        return self.norms if "norm" in name else torch.bfloat16

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        raise AssertionError("weights were read")


def release(name: str) -> tuple[dict[str, Any], bool, int, int]:
    params, tied, count, cache = RELEASES[name]
    scaled = not name.startswith("3 ")
    more = {"ffn_dim_multiplier": MULTIPLIERS[name], "use_scaled_rope": scaled}
    return COMMON | params | more, tied, count, cache


@pytest.mark.parametrize("name", RELEASES)
def test_published_sizes(name: str) -> None:
    params, tied, count, cache = release(name)
    args = ModelArgs(**params)
    assert parameter_count(args, tied) == count
    assert cache_bytes(args, 1, 1) == cache
    assert cache_bytes(args, 3, 50, dtype_bytes=4) == 3 * 50 * 2 * cache


def test_tied_output_is_not_counted() -> None:
    args = ModelArgs(**release("3.2 1B")[0])
    assert parameter_count(args, False) - parameter_count(args, True) == 128256 * 2048


def test_text_of_8b() -> None:
    source = Sizes(release("3 8B")[0])
    source.n_shards = 1
    lines = describe(source, 2, 4096).splitlines()
    assert lines == [
        "layout      Meta, 1 shard",
        "shape       dim 4096, 32 layers, feed-forward 14336",
        "heads       32, with 8 KV heads, of 128",
        "vocabulary  128256 tokens",
        "parameters  8,030,261,248",
        "output      weights of its own",
        "stored as   bfloat16",
        "weights     16.06 GB (16,060,522,496 bytes)",
        "context     trained for 8192 tokens",
        "RoPE        theta 500000, not scaled",
        "KV cache    1.07 GB in bf16 for 2 x 4096 tokens",
        "            131,072 bytes a token",
        "ranks       1     16.06 GB of weights each",
        "            2      8.03 GB of weights each",
        "            4      4.02 GB of weights each",
        "            8      2.01 GB of weights each",
        "            16     1.04 GB of weights each",
        "            32   552.74 MB of weights each",
    ]


def test_text_of_1b() -> None:
    source = Sizes(release("3.2 1B")[0], tied=True, layout="hf")
    text = describe(source)
    for part in (
        "layout      Hugging Face, 1 shard\n",
        "1,235,814,400",
        "tied to the embedding",
        "2.47 GB (2,471,628,800 bytes)",
        "trained for 131072 tokens",
        "scaled by 32",
    ):
        assert part in text


def test_describing_405b_is_fast() -> None:
    """1136 weights and 8 rank counts: the work must not grow with their square."""
    source = Sizes(release("3.1 405B")[0])
    source.n_shards = 8
    text = describe(source)
    assert "8 shards" in text and "811.71 GB" in text
    assert "\n            8    101.47 GB of weights each\n" in text


def test_mixed_dtypes() -> None:
    source = Sizes({"dim": 64, "n_layers": 2, "n_heads": 4} | SMALL)
    source.norms = torch.float32
    text = describe(source)
    args = source.args()
    norms = 5 * 64
    assert f"({2 * parameter_count(args, False) + 2 * norms:,} bytes)" in text
    assert "bfloat16 (9" in text and "float32 (" in text


@pytest.mark.parametrize("size", [1, 2, 4])
def test_rank_bytes_by_reading_parts(size: int) -> None:
    """Compared with the parts that a rank reads; KV heads can be on several ranks."""
    from llama.distributed.sharding import rank_part

    source = Sizes({"dim": 64, "n_layers": 2, "n_heads": 4} | SMALL)
    args = source.args()
    assert size in rank_counts(args)
    for rank in range(size):
        held = 0
        for name, shape in weight_shapes(args).items():
            w = torch.empty(shape, dtype=torch.bfloat16)
            if part := rank_part(name, args, rank, size):
                w = w.narrow(part[0], part[1], part[2] - part[1])
            held += w.numel() * 2
        assert rank_bytes(source, args, size) == held


def test_files(tiny_checkpoint: Callable[..., Path]) -> None:
    from llama.checkpoints.open import open_checkpoint

    text = describe(open_checkpoint(tiny_checkpoint(vocab_size=300)), 1, 16)
    assert "Meta, 1 shard" in text and "float32" in text and "300 tokens" in text


def test_missing_weight() -> None:
    source = Sizes({"dim": 64, "n_layers": 2, "n_heads": 4} | SMALL)
    shapes = source.shapes()
    source.shapes = lambda: {n: s for n, s in shapes.items() if n != "norm.weight"}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"missing: norm\.weight"):
        describe(source)
