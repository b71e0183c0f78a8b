"""Gradients through quantized linears to their inputs, without keeping dequantized weights.

Codes get no gradient. Shapes: M rows of x; N outputs, K inputs of a linear.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from llama.layers.block_products import unpack_blocks
from llama.layers.blocks import block_width
from llama.layers.quantization import dequantize_int8, unpack_int4, widen_int8
from llama.layers.schemes import GROUPS

# Weights that are dequantized at a time in the backward pass: 8 MB in fp32.
BLOCK_SIZE = 1 << 21


class Quantized(Protocol):
    """A linear whose two matmuls have no gradient of their own."""

    def multiply(self, x: Tensor) -> Tensor:
        """x (..., K) times the transpose of the weight: (..., N)."""

    def multiply_back(self, grad: Tensor) -> Tensor:
        """The gradient of x (..., K), given that of the outputs (..., N)."""


class _FrozenLinear(torch.autograd.Function):
    """The linear, as an operation that saves no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Quantized) -> Tensor:
        ctx.linear = linear
        return linear.multiply(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.linear.multiply_back(grad), None


def frozen_linear(x: Tensor, linear: Quantized) -> Tensor:
    """`linear.multiply(x)`, with a gradient to x."""
    if torch.is_grad_enabled() and x.requires_grad:
        y: Tensor = _FrozenLinear.apply(x, linear)  # type: ignore[no-untyped-call]
        return y
    return linear.multiply(x)


def columns_at_once(n: int) -> int:
    """How many columns of n rows are dequantized at a time; a multiple of every group."""
    most = max(GROUPS)
    return max(BLOCK_SIZE // n // most, 1) * most


def multiply_back_int8(grad: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """grad (..., N) times a `quantize_int8` weight: (..., K) in grad's dtype."""
    parts = q.split(columns_at_once(len(q)), dim=1)
    if grad.dtype == torch.float16:  # small gradients times scales would underflow
        return torch.cat([grad @ dequantize_int8(q, scale).to(grad.dtype) for q in parts], dim=-1)
    grad = (grad * scale).to(grad.dtype)
    return torch.cat([grad @ widen_int8(grad, q.contiguous()) for q in parts], dim=-1)


def multiply_back_int4(grad: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, n: int) -> Tensor:
    """grad (..., n) times a `quantize_int4` weight of n rows: (..., K) in grad's dtype."""
    columns, groups = columns_at_once(n), scale.shape[1]
    group = packed.shape[1] * 8 // groups
    parts = zip(
        packed.split(columns // 8, dim=1),
        scale.split(columns // group, dim=1),
        zero.split(columns // group, dim=1),
        strict=True,
    )
    blocks = ([part.contiguous() for part in block] for block in parts)
    return torch.cat([grad @ unpack_int4(grad, p, s, z, n) for p, s, z in blocks], dim=-1)


def multiply_back_blocks(grad: Tensor, blocks: Tensor, n: int) -> Tensor:
    """grad (..., n) times a weight in blocks, of n rows: (..., K) in grad's dtype."""
    width = block_width(blocks) // blocks.shape[1]
    parts = blocks.split(max(columns_at_once(n) // width, 1), dim=1)
    weights = (unpack_blocks(grad, part.contiguous(), n) for part in parts)
    return torch.cat([grad @ w for w in weights], dim=-1)
