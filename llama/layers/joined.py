"""Attention and feed-forward with fewer and larger matmuls: linears of one input as one.

Each computes what the replaced module computes. Shapes: B rows, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama.distributed.tensor_parallel import copy_to_ranks, reduce_from_ranks
from llama.layers.kernel_modules import rotate, swiglu
from llama.layers.quantized_linear import QUANTIZED, BlockLinear, Int4Linear
from llama.layers.replace import Factory, as_class
from llama.layers.schemes import TILE
from llama.model import Attention, FeedForward

TILED = (Int4Linear, BlockLinear)  # whose rows lie in tiles


class JoinedHeads(Attention):
    """Attention whose queries, keys and values come from one matmul."""

    wqkv: nn.Module

    def heads(self, x: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = x.shape
        H, K = self.n_local_heads, self.n_local_kv_heads
        xqkv = self.wqkv(x).view(B, T, H + 2 * K, self.head_dim)
        xq, xk, xv = xqkv.split((H, K, K), dim=2)
        xq, xk = rotate(xq, xk, freqs_cis)
        return xq, xk, xv


class JoinedFeedForward(FeedForward):
    """A feed-forward whose gate and up projections come from one matmul."""

    w13: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(copy_to_ranks(x)).chunk(2, dim=-1)
        return reduce_from_ranks(self.w2(swiglu(gate, up)))


def joined(kind: type[nn.Module], whole: str, *parts: str) -> Factory:
    """A factory that makes a `kind`, whose linear `whole` is the linears `parts` in one.

    It returns the module itself where its linears cannot be joined.
    """

    def factory(name: str, module: nn.Module) -> nn.Module:
        linear = join(*(module.get_submodule(part) for part in parts))
        if linear is None:
            return module
        replacement = as_class(module, kind)
        for part in parts:
            delattr(replacement, part)
        setattr(replacement, whole, linear)
        return replacement

    return factory


def join(*linears: nn.Module) -> nn.Module | None:
    """One linear with the outputs of several one after the other; None where that is impossible."""
    first, kind = linears[0], type(linears[0])
    if kind not in (nn.Linear, *QUANTIZED) or any(type(x) is not kind for x in linears):
        return None
    if any(x.n % TILE for x in linears[:-1] if isinstance(x, TILED)):
        return None  # only the last may have a tile that is not full
    whole = as_class(first, kind)
    for name in first.state_dict():
        rows = torch.cat([getattr(linear, name).detach() for linear in linears])
        setattr(whole, name, nn.Parameter(rows, False) if kind is nn.Linear else rows)
    if isinstance(whole, nn.Linear):
        whole.out_features = len(whole.weight)
    if isinstance(whole, TILED):
        whole.n = sum(x.n for x in linears if isinstance(x, TILED))
    return whole
