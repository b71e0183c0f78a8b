"""Matmuls with weights in blocks (blocks.py). Knows nothing about models.

Shapes: n rows (outputs) and K columns of a weight in `blocks` (T, B, bytes of a block).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.layers import kernels
from llama.layers.blocks import dequantize_blocks
from llama.layers.quantization import side_by_side
from llama.layers.schemes import BLOCK, TILE


def linear_blocks(x: Tensor, blocks: Tensor, n: int) -> Tensor:
    """x (..., K) times the transpose of the weight: (..., n) in x's dtype."""
    if kernels.is_fastest("blocks", x):
        y: Tensor = torch.ops.llama3.linear_blocks(x, blocks, n)
        return y
    if x.dtype == torch.float16 and x.device.type == "cpu" and kernels.supports(wide := x.float()):
        return linear_blocks(wide, blocks, n).to(x.dtype)  # the kernels have no float16
    weights = (unpack_blocks(x, *part) for part in parts_of_blocks(blocks, n))
    return side_by_side((F.linear(x, w) for w in weights), n)


def parts_of_blocks(blocks: Tensor, n: int) -> Iterator[tuple[Tensor, int]]:
    """The weight in parts: their blocks, and how many rows each has."""
    for part in blocks.split(BLOCK // TILE):
        yield part, min(len(part) * TILE, n)
        n -= len(part) * TILE


def unpack_blocks(x: Tensor, blocks: Tensor, n: int) -> Tensor:
    """`dequantize_blocks` in x's dtype."""
    if kernels.supports(x):
        w: Tensor = torch.ops.llama3.unpack_blocks(x, blocks, n)
        return w
    return dequantize_blocks(blocks, n).to(x.dtype)
