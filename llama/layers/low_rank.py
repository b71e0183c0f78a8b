"""The matmuls of a low-rank update, and their gradients. Knows no modules.

Shapes: M rows of x; N outputs and K inputs of a linear, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llama.layers import kernels


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y + scale * x A^T B^T, in y's dtype. y itself may be changed.

    Args:
        y, x, a, b: (..., N), (..., K), (r, K), (N, r).
    """
    x = x.to(y.dtype)
    if torch.compiler.is_compiling():
        return torch.add(y, F.linear(F.linear(x, a.to(y.dtype)), b.to(y.dtype)), alpha=scale)
    if y._is_view() or not y.is_contiguous():
        y = y.clone(memory_format=torch.contiguous_format)
    if torch.is_grad_enabled():
        z: Tensor = _AddLowRank.apply(y, x, a, b, scale)
        return z
    if kernels.is_fastest_with(x, a, b):
        h = torch.ops.llama3.linear(x, a)
        return y.add_(torch.ops.llama3.linear(h, b), alpha=scale)
    _add_low_rank(y, x, a, b, scale)
    return y


def _add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Change y; return h = A x^T, (r, M) for M rows of x. It is faster so than x A^T."""
    h = a.to(y.dtype) @ x.reshape(-1, x.shape[-1]).t()
    y.view(-1, y.shape[-1]).addmm_(h.t(), b.to(y.dtype).t(), alpha=scale)
    return h


class _AddLowRank(torch.autograd.Function):
    """`add_low_rank` in place. Saves x, A x^T and the parameters."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        h = _add_low_rank(y, x, a, b, scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, h, a, b)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, b = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])  # (M, N)
        dh = (b.to(g.dtype).t() @ g.t()).mul_(ctx.scale)  # (r, M)
        dx = da = db = None
        if ctx.needs_input_grad[1]:
            dx = (dh.t() @ a.to(g.dtype)).view(x.shape)
        if ctx.needs_input_grad[2]:
            da = (dh @ x.reshape(-1, x.shape[-1])).to(a.dtype)
        if ctx.needs_input_grad[3]:
            db = (h @ g).mul_(ctx.scale).t().to(b.dtype)
        return grad, dx, da, db, None
