"""Replacements of `DotProductAttention`, the core of attention: faster, with the same result.

Shapes: B rows, T new positions a row, S positions read, D head_dim, H / K query / key-value heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.layers import kernels
from llama.layers.schemes import EXACT_SCORES
from llama.model import CacheSlice, DotProductAttention


class GroupedAttention(DotProductAttention):
    """The reference's arithmetic without copies of key-value heads; fused for long prompts."""

    def forward(
        self,
        xq: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        at: CacheSlice | None = None,
    ) -> Tensor:
        return grouped_attention(xq, keys, values, mask)


class KernelAttention(DotProductAttention):
    """Attention by the CPU kernel, which reads the cache once and only up to each position.

    Where the kernel cannot run: torch's fused kernel in half precision, else `GroupedAttention`.
    In fp32 the kernel is used for T = 1 only, so that prompts get the reference's arithmetic.
    """

    def forward(
        self,
        xq: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        at: CacheSlice | None = None,
    ) -> Tensor:
        wanted = xq.dtype == keys.dtype and (xq.dtype == torch.bfloat16 or xq.shape[1] == 1)
        if at is not None and wanted and kernels.supports(xq):
            out: Tensor = torch.ops.llama3.attend(xq, keys, values, at.positions)
            return out
        if xq.dtype in (torch.bfloat16, torch.float16):
            return fused_attention(xq, keys, values, mask)
        return grouped_attention(xq, keys, values, mask)


class FlashAttention(DotProductAttention):
    """Attention on CUDA in half precision: each row of the cache is read as far as it is filled.

    Needs no mask. Without a cache, torch chooses the kernel.
    """

    def forward(
        self,
        xq: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        at: CacheSlice | None = None,
    ) -> Tensor:
        half = xq.dtype in (torch.bfloat16, torch.float16)
        if at is None or not half or not xq.is_cuda:  # no cache, or the model has been moved
            return fused_attention(xq, keys, values, mask)
        flash = torch.ops.llama3.flash_attend
        out: Tensor = flash(xq, keys, values, at.queries, at.keys, at.ends)
        return out


def grouped_attention(xq: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """See `GroupedAttention`. Arguments and result are those of `DotProductAttention.forward`."""
    B, T, H, _ = xq.shape
    if B * H * T * keys.shape[1] <= EXACT_SCORES:
        return folded_attention(xq, keys, values, mask)
    return fused_attention(xq, keys, values, mask)


def fused_attention(xq: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """torch's kernel, which does not store scores. Arguments as in `grouped_attention`."""
    B, T, H, D = xq.shape
    K = keys.shape[2]
    if xq.device.type == "mps":  # torch's kernel is wrong there in several releases
        return folded_attention(xq, keys, values, mask)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if T == 1:  # query heads of a group become queries of their key-value head
        xq = xq.view(B, K, H // K, D)
        return F.scaled_dot_product_attention(xq, keys, values, mask).reshape(B, 1, H, D)
    out = F.scaled_dot_product_attention(
        xq.transpose(1, 2), keys, values, mask, is_causal=mask is None, enable_gqa=H != K
    )
    return out.transpose(1, 2)


def folded_attention(xq: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """One matmul for all query heads of a group. Arguments as in `grouped_attention`."""
    B, T, H, D = xq.shape
    S, K = keys.shape[1:3]
    folded = xq.view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, -1, D)
    scores = folded @ keys.permute(0, 2, 3, 1) / math.sqrt(D)
    scores = scores.view(B, K, H // K, T, S)
    if mask is None and T > 1:
        mask = torch.ones(T, S, dtype=torch.bool, device=xq.device).tril(S - T)
    if mask is not None:
        hidden = (mask.unsqueeze(1) if mask.dim() == 4 else mask).logical_not()
        scores = scores.masked_fill(hidden, -math.inf)
    weights = F.softmax(scores.float(), dim=-1).type_as(xq).view(B, K, -1, S)
    out = (weights @ values.transpose(1, 2)).view(B, K, H // K, T, D)
    return out.permute(0, 3, 1, 2, 4).reshape(B, T, H, D)
