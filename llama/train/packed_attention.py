"""Attention without a cache, for training. Packed samples do not see each other.

Shapes: B rows, T positions, H / K query / key-value heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama.layers.attention import fused_attention, grouped_attention
from llama.model import DotProductAttention


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
            return grouped_attention(xq, keys, values, mask)
        parts = zip(*(x.split(at.lengths, dim=1) for x in (xq, keys, values)), strict=True)
        return torch.cat([fused_attention(q, k, v, None) for q, k, v in parts], dim=1)
