"""Replacements of the model's modules that use the CPU kernels where these support the input.

For other devices and dtypes, and with gradients, each computes what the replaced module computes.
Shapes: B rows, T positions, D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.distributed.tensor_parallel import copy_to_ranks, reduce_from_ranks
from llama.layers import kernels
from llama.model import Attention, FeedForward, RMSNorm, apply_rotary_emb


class KernelRMSNorm(RMSNorm):
    """The norm in one pass over x."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if x.dtype != w.dtype or (torch.is_grad_enabled() and w.requires_grad):
            return super().forward(x)
        if not kernels.supports(x):
            return super().forward(x)
        y: Tensor = torch.ops.llama3.rms_norm(x, w, self.eps)
        return y


class KernelLinear(nn.Linear):
    """A linear that is limited only by reading its weight where x has few rows."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight)


class KernelHeads(Attention):
    """Attention that computes queries, keys and values in one call and rotates by a kernel."""

    def heads(self, x: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = x.shape
        xq, xk, xv = linears(x, self.wq, self.wk, self.wv)
        xq = xq.view(B, T, self.n_local_heads, self.head_dim)
        xk = xk.view(B, T, self.n_local_kv_heads, self.head_dim)
        xv = xv.view(B, T, self.n_local_kv_heads, self.head_dim)
        xq, xk = rotate(xq, xk, freqs_cis)
        return xq, xk, xv


class KernelFeedForward(FeedForward):
    """A feed-forward with w1 and w3 in one call, and silu and product in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linears(copy_to_ranks(x), self.w1, self.w3)
        return reduce_from_ranks(self.w2(swiglu(gate, up)))


def linears(x: Tensor, *modules: nn.Module) -> list[Tensor]:
    """[module(x), ...]; one call for plain weights, which saves time for small matrices."""
    weights = [module.weight for module in modules if type(module) is KernelLinear]
    if len(weights) == len(modules) and kernels.is_fastest_with(x, *weights):
        ys: list[Tensor] = torch.ops.llama3.linears(x, weights)
        return ys
    return [module(x) for module in modules]


def rotate(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """See `apply_rotary_emb`.

    Args:
        freqs_cis: complex, or its `torch.view_as_real`: torch.compile supports no complex numbers.
    """
    if not freqs_cis.is_complex():
        return rotate_pairs(xq, freqs_cis), rotate_pairs(xk, freqs_cis)
    if kernels.supports(xq) and kernels.supports(xk):
        rotary = torch.ops.llama3.rotary
        return rotary(xq, freqs_cis), rotary(xk, freqs_cis)
    return apply_rotary_emb(xq, xk, freqs_cis)


def rotate_pairs(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate x (B, T, heads, D) by cosines and sines (T or B x T, D / 2, 2)."""
    cos, sin = cos_sin.unsqueeze(-3).unbind(-1)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(x)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    if kernels.supports(gate) and kernels.supports(up):
        y: Tensor = torch.ops.llama3.swiglu(gate, up)
        return y
    return F.silu(gate) * up
