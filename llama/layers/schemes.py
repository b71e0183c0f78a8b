"""Sizes and limits of the quantization schemes. Imports no torch, so that a plan needs none."""

from __future__ import annotations

from llama.distributed.sharding import Sizes, rank_counts, rank_shapes

SCHEMES = ("int8", "int4")
GROUPS = (32, 64, 128)  # inputs that share a scale in int4
TILE = 16  # rows of an int4 weight that lie together
# Rows that are quantized or dequantized at a time: at common widths they fit the processor's cache.
BLOCK = 512
# Up to this many scores, the arithmetic of attention is the reference's (scores in the model's
# dtype, softmax in fp32), so that a seed draws the same ids as in Meta's code. More scores would
# take over 64 MB in fp32; torch's fused kernel, which does not store them, is used instead.
EXACT_SCORES = 1 << 24


def check_scheme(scheme: object, group: object = 32) -> None:
    """Raise a ValueError unless there are this scheme and this group size."""
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; use one of {list(SCHEMES)}")
    if type(group) is not int or group not in GROUPS:
        raise ValueError(f"groups of {group!r} weights are not possible; use one of {GROUPS}")


def undivided(args: Sizes, ranks: int, group: int) -> dict[str, int]:
    """{name: columns} of the first layer's matrices whose columns `group` does not divide."""
    shapes = rank_shapes(args, ranks).items()
    matrices = {name: s[1] for name, s in shapes if len(s) == 2 and name.startswith("layers.")}
    return {name: columns for name, columns in matrices.items() if columns % group}


def possible_ranks(args: Sizes, quantize: str | None = None, group: int = 32) -> list[int]:
    """`rank_counts`, without those that would split a group of int4 between ranks."""
    counts = rank_counts(args)
    return [n for n in counts if quantize != "int4" or not undivided(args, n, group)]
