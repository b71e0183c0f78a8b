"""Attention without a cache, for training. Packed samples do not see each other.

Shapes: B rows, T positions, H / K query / key-value heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama.layers.attention import folded_attention, fused_attention
from llama.model import DotProductAttention

LONG = 512  # positions from which torch's kernel is faster in bf16 on a CPU; measured


@dataclass(frozen=True)
class PackedSamples:
    """How many positions each sample of the only row has; takes the place of a `CacheSlice`.

    It is an argument of each layer, so that recomputation has that of its own batch.
    """

    lengths: tuple[int, ...]

    def positions(self, device: torch.device) -> Tensor:
        """(T,) int64: each sample's positions begin at 0."""
        return torch.cat([torch.arange(n, device=device) for n in self.lengths])


class TrainingAttention(DotProductAttention):
    """Causal attention of whole rows, or of the samples of one row."""

    def forward(
        self, xq: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, at: Any = None
    ) -> Tensor:
        """See `DotProductAttention`. `at`: `PackedSamples`, or None where a row is one sample."""
        if not isinstance(at, PackedSamples):
            return causal_attention(xq, keys, values, mask)
        parts = zip(*(x.split(at.lengths, dim=1) for x in (xq, keys, values)), strict=True)
        return torch.cat([causal_attention(q, k, v, None) for q, k, v in parts], dim=1)


def causal_attention(xq: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """The faster of two: torch's kernel, which stores no scores, or matmuls over short rows."""
    bf16_on_cpu = xq.dtype == torch.bfloat16 and xq.device.type == "cpu"
    if bf16_on_cpu and xq.shape[1] < LONG:
        return folded_attention(xq, keys, values, mask)
    return fused_attention(xq, keys, values, mask)
