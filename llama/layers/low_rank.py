"""The matmuls of a low-rank update, and their gradients. Knows no modules.

Shapes: M rows of x; N outputs and K inputs of a linear, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from llama.layers import kernels


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y + scale * x A^T B^T, in y's dtype. Without gradients, y itself may be changed.

    Args:
        y, x, a, b: (..., N), (..., K), (r, K), (N, r).
    """
    x = x.to(y.dtype)
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return torch.add(y, F.linear(F.linear(x, a.to(y.dtype)), b.to(y.dtype)), alpha=scale)
    if kernels.is_fastest_with(x, a, b):
        h = torch.ops.llama3.linear(x, a)
        return y.add_(torch.ops.llama3.linear(h, b), alpha=scale)
    y = y.contiguous()
    _add_low_rank(y, x, a, b, scale)
    return y


def _add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Change y; return h = A x^T, (r, M), which is faster than x A^T."""
    h = a.to(y.dtype) @ x.reshape(-1, x.shape[-1]).t()
    y.view(-1, y.shape[-1]).addmm_(h.t(), b.to(y.dtype).t(), alpha=scale)
    return h


def has_fused_gradient(x: Tensor, base: nn.Module) -> bool:
    """Whether `adapted_linear` supports the input and the linear, and gradients are needed."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.get_autocast_dtype(device):
        return False
    if isinstance(base, nn.Linear):
        return base.weight.dtype == x.dtype and not base.weight.requires_grad
    return hasattr(base, "multiply_back")


def adapted_linear(
    x: Tensor, dropped: Tensor | None, a: Tensor, b: Tensor, scale: float, base: nn.Module
) -> Tensor:
    """base(x) + scale * x A^T B^T, with one gradient of x for both terms.

    Args:
        dropped: x with dropout, from which the second term is computed; None: x itself.
        base: a linear whose weight is frozen, plain or quantized.
    """
    weight = base.weight if isinstance(base, nn.Linear) else None
    y: Tensor = _AdaptedLinear.apply(x, dropped, a, b, weight, scale, base)  # type: ignore[no-untyped-call]
    return y


class _AdaptedLinear(torch.autograd.Function):
    """Saves x, A x^T and the parameters. Adds in place, which separate operations cannot."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        a: Tensor,
        b: Tensor,
        weight: Tensor | None,
        scale: float,
        base: nn.Module,
    ) -> Tensor:
        y: Tensor = base(x).contiguous()
        inputs = x if dropped is None else dropped
        h = _add_low_rank(y, inputs, a, b, scale)
        ctx.save_for_backward(inputs, h, a, b, weight)
        ctx.scale, ctx.base, ctx.is_dropped = scale, base, dropped is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, h, a, b, weight = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])  # (M, N)
        dh = (b.to(g.dtype).t() @ g.t()).mul_(ctx.scale)  # (r, M)
        dx = d_dropped = da = db = None
        if ctx.needs_input_grad[0]:
            dx = ctx.base.multiply_back(g) if weight is None else g @ weight
        if ctx.is_dropped and ctx.needs_input_grad[1]:
            d_dropped = (dh.t() @ a.to(g.dtype)).view(inputs.shape)
        elif dx is not None:
            dx.addmm_(dh.t(), a.to(g.dtype))
        if ctx.needs_input_grad[2]:
            da = (dh @ inputs.reshape(-1, inputs.shape[-1])).to(a.dtype)
        if ctx.needs_input_grad[3]:
            db = (h @ g).mul_(ctx.scale).t().to(b.dtype)
        dx = None if dx is None else dx.view(inputs.shape)
        return dx, d_dropped, da, db, None, None, None
