"""How queries read keys and values, and where those are kept. Knows nothing about weights.

Shapes: B rows, T new positions a row, S positions read, D head_dim, H / K query / key-value heads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.layers import kernels


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """(B, S, K, D) -> (B, S, K * n_rep, D): each key-value head n_rep times in a row."""
    return x if n_rep == 1 else x.repeat_interleave(n_rep, dim=2)


def causal_mask(positions: Tensor, length: int) -> Tensor:
    """True where a query may look, keys 0 to its own position: (T, S), or (B, 1, T, S)."""
    mask = torch.arange(length, device=positions.device) <= positions.unsqueeze(-1)
    return mask.unsqueeze(1) if mask.dim() == 3 else mask


def plain_attention(
    xq: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    positions: Tensor | None = None,
) -> Tensor:
    """Attention as the formula says it; same arguments as `grouped_attention`, its oracle."""
    _, T, H, D = xq.shape
    S = keys.shape[1]
    keys, values = (repeat_kv(x, H // x.shape[2]).transpose(1, 2) for x in (keys, values))
    scores = xq.transpose(1, 2) @ keys.transpose(2, 3) / math.sqrt(D)  # (B, H, T, S)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=xq.device).tril(S - T)
    scores = scores.masked_fill(~mask, float("-inf"))
    scores = F.softmax(scores.float(), dim=-1).type_as(xq)
    return (scores @ values).transpose(1, 2)


# Below this many scores they are computed as the reference does, in the model's dtype with the
# softmax in fp32, so that the same seed draws the same ids; above it memory decides (they are
# 64 MB in fp32 here), and the fused kernel never holds them.
EXACT_SCORES = 1 << 24


def grouped_attention(
    xq: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    positions: Tensor | None = None,
) -> Tensor:
    """Grouped-query attention, arXiv:2305.13245, without copying the key-value heads.

    Args:
        xq: (B, T, H, D); query head h reads key-value head h // (H / K).
        keys, values: (B, S, K, D).
        mask: booleans, true where a query may look, (T, S) or (B, 1, T, S). None: causal if
            T = S, everything if T = 1.
        positions: int64, (B or 1, T), where the keys are a cache's: the last key of each query.
            It says what the mask says, for `kernel_attention`.

    Returns:
        (B, T, H, D).
    """
    B, T, H, _ = xq.shape
    if B * H * T * keys.shape[1] <= EXACT_SCORES:
        return exact_grouped_attention(xq, keys, values, mask)
    return fused_grouped_attention(xq, keys, values, mask)


def fused_grouped_attention(
    xq: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    positions: Tensor | None = None,
) -> Tensor:
    """By torch's kernel, which holds no scores; same arguments as `grouped_attention`."""
    B, T, H, D = xq.shape
    K = keys.shape[2]
    if xq.device.type == "mps":  # where it has given wrong results in several releases of torch
        return exact_grouped_attention(xq, keys, values, mask)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if T == 1:  # a group's query heads become the queries of their key-value head
        xq = xq.view(B, K, H // K, D)
        return F.scaled_dot_product_attention(xq, keys, values, mask).reshape(B, 1, H, D)
    out = F.scaled_dot_product_attention(
        xq.transpose(1, 2), keys, values, mask, is_causal=mask is None, enable_gqa=H != K
    )
    return out.transpose(1, 2)


def exact_grouped_attention(
    xq: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    positions: Tensor | None = None,
) -> Tensor:
    """`plain_attention`'s arithmetic on folded heads; same arguments as `grouped_attention`."""
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


def kernel_attention(
    xq: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    positions: Tensor | None = None,
) -> Tensor:
    """By the CPU kernel, which reads a cache at the memory's speed and nothing beyond a position.

    Where it cannot serve, by torch's in half precision, else as `grouped_attention`; same
    arguments. In fp32 it serves single queries only: a prompt is computed as the reference does.
    """
    fits = xq.dtype == keys.dtype and (xq.dtype == torch.bfloat16 or xq.shape[1] == 1)
    if positions is not None and fits and kernels.takes(xq):
        out: Tensor = torch.ops.llama3.attend(xq, keys, values, positions)
        return out
    half = xq.dtype in (torch.bfloat16, torch.float16)
    attend = fused_grouped_attention if half else grouped_attention
    return attend(xq, keys, values, mask)


class CacheSlice(NamedTuple):
    """Where new keys and values go, and what their queries read.

    Attributes:
        rows, positions: int64, (B, 1) and (B or 1, T): the index of each new position.
        first_row: `rows` are this one and the B - 1 after it.
        length: how many positions of those rows are read.
    """

    rows: Tensor
    positions: Tensor
    first_row: int
    length: int


class KVCache(nn.Module):
    """Keys and values of one layer, (max_batch, max_seq_len, K, D) each.

    Row b's position p lives in `k[b, p]`. What lies beyond a row's position is written before the
    row gets there; until then it must be finite, because a masked weight of 0 times NaN is NaN.
    """

    k: Tensor
    v: Tensor

    def __init__(self, shape: tuple[int, int, int, int], like: Tensor):
        super().__init__()
        for name in ("k", "v"):
            zeros = torch.zeros(shape, dtype=like.dtype, device=like.device)
            self.register_buffer(name, zeros, persistent=False)

    def update(self, xk: Tensor, xv: Tensor, at: CacheSlice) -> tuple[Tensor, Tensor]:
        """Write (B, T, K, D) there; the positions to read, (B, at.length, K, D), as views."""
        B = len(xk)
        for cache, new in ((self.k, xk), (self.v, xv)):
            cache.index_put_((at.rows, at.positions), new)
        k, v = (c.narrow(0, at.first_row, B).narrow(1, 0, at.length) for c in (self.k, self.v))
        return k, v

    def clear(self, row: int, start: int, stop: int) -> None:
        """Zero the positions `start`:`stop` of a row."""
        for cache in (self.k, self.v):
            cache[row, start:stop] = 0

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` to row `target`."""
        for cache in (self.k, self.v):
            cache[target, :length] = cache[source, :length]

    def swap_rows(self, a: int, b: int, length: int) -> None:
        """Exchange the first `length` positions of two rows."""
        for cache in (self.k, self.v):
            kept = cache[a, :length].clone()
            cache[a, :length] = cache[b, :length]
            cache[b, :length] = kept
