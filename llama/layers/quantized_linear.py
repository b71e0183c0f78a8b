"""Replacements of a linear that store its weight in 8 or 4 bits. Imports no model.

Shapes: N outputs, K inputs. Each takes x (..., K) and returns (..., N) in x's dtype. x gets a
gradient, the codes none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from llama.distributed import tensor_parallel
from llama.distributed.sharding import Sizes, rank_counts, shard_dim
from llama.layers.block_products import linear_blocks, parts_of_blocks
from llama.layers.blocks import block_width, dequantize_blocks, quantize_blocks
from llama.layers.quantization import (
    blocks_int4,
    dequantize_int4,
    dequantize_int8,
    linear_int4,
    linear_int8,
    quantize_int4,
    quantize_int8,
    row_largest,
)
from llama.layers.quantized_grad import (
    frozen_linear,
    multiply_back_blocks,
    multiply_back_int4,
    multiply_back_int8,
)
from llama.layers.replace import Factory
from llama.layers.schemes import BLOCK, Form, Scheme, block_layout, find_scheme, undivided
from llama.layers.schemes import check_scheme as check_scheme
from llama.layers.schemes import possible_ranks as possible_ranks


class Int8Linear(nn.Module):
    """A linear with one byte per weight and one scale per output.

    Args:
        weight: (N, K). On the meta device, the codes and scales are on it too.
        largest: see `quantize_int8`.
    """

    scheme = "int8"
    q: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, largest: Tensor | None = None):
        super().__init__()
        q, scale = quantize_int8(weight, largest)
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self)

    def multiply(self, x: Tensor) -> Tensor:
        return linear_int8(x, self.q, self.scale)

    def multiply_back(self, grad: Tensor) -> Tensor:
        return multiply_back_int8(grad, self.q, self.scale)

    @property
    def out_features(self) -> int:
        return self.q.shape[0]

    @property
    def in_features(self) -> int:
        return self.q.shape[1]

    def row_parts(self) -> Iterator[Tensor]:
        """See `weight_blocks`."""
        parts = zip(self.q.split(BLOCK), self.scale.split(BLOCK), strict=True)
        return (dequantize_int8(*part) for part in parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        apply_to_codes(self, fn, recurse)
        return self


class Int4Linear(nn.Module):
    """A linear with half a byte per weight, and one scale and one zero per group of inputs.

    Args:
        weight: (N, K). On the meta device, the codes, scales and zeros are on it too.
        group: inputs that share a scale and a zero; must divide K.
    """

    scheme = "int4"
    packed: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, group: int = 32):
        super().__init__()
        self.n, self.group = len(weight), group
        packed, scale, zero = quantize_int4(weight, group)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self)

    def multiply(self, x: Tensor) -> Tensor:
        return linear_int4(x, self.packed, self.scale, self.zero, self.n)

    def multiply_back(self, grad: Tensor) -> Tensor:
        return multiply_back_int4(grad, self.packed, self.scale, self.zero, self.n)

    @property
    def out_features(self) -> int:
        return self.n

    @property
    def in_features(self) -> int:
        return self.packed.shape[1] * 8

    def row_parts(self) -> Iterator[Tensor]:
        """See `weight_blocks`."""
        for block in blocks_int4(self.packed, self.scale, self.zero, self.n):
            yield dequantize_int4(*block)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int4Linear:
        apply_to_codes(self, fn, recurse)
        return self


class BlockLinear(nn.Module):
    """A linear of 4 or 6 bits a weight and half a bit for scales; see blocks.py.

    Args:
        weight: (N, K). On the meta device, the blocks are on it too.
    """

    scheme = "int4"
    blocks: Tensor

    def __init__(self, weight: Tensor, bits: int = 4):
        super().__init__()
        self.n = len(weight)
        self.register_buffer("blocks", quantize_blocks(weight, bits))

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self)

    @property
    def bits(self) -> int:
        return block_layout(self.blocks.shape[2])[0]

    def multiply(self, x: Tensor) -> Tensor:
        return linear_blocks(x, self.blocks, self.n)

    def multiply_back(self, grad: Tensor) -> Tensor:
        return multiply_back_blocks(grad, self.blocks, self.n)

    @property
    def out_features(self) -> int:
        return self.n

    @property
    def in_features(self) -> int:
        return block_width(self.blocks)

    def row_parts(self) -> Iterator[Tensor]:
        """See `weight_blocks`."""
        return (dequantize_blocks(*part) for part in parts_of_blocks(self.blocks, self.n))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockLinear:
        apply_to_codes(self, fn, recurse)
        return self


QUANTIZED = (Int8Linear, Int4Linear, BlockLinear)


def weight_blocks(linear: nn.Module) -> Iterator[Tensor]:
    """The weight of a linear of any kind, dequantized, in blocks of rows (N', K), fp32."""
    if isinstance(linear, nn.Linear):
        weight = linear.weight.detach()
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # FSDP's shards
        return (rows.float() for rows in weight.split(BLOCK))
    blocks: Iterator[Tensor] = linear.row_parts()  # type: ignore[operator]
    return blocks


def row_squares(linear: nn.Module) -> Tensor:
    """The sum of squares of each row of a linear's weight, (N,) fp32."""
    return torch.cat([rows.square().sum(dim=1) for rows in weight_blocks(linear)])


def apply_to_codes(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
    """`nn.Module._apply`, which `.to()` calls, with buffers that keep their dtypes.

    `.to(torch.bfloat16)` moves the rest of a model to another dtype. Scales must not be rounded,
    and have the one dtype that the kernels know.
    """
    before = dict(module.named_buffers(recurse=False))
    nn.Module._apply(module, fn, recurse)
    for name, old in before.items():
        new = module.get_buffer(name)
        if new.dtype != old.dtype:
            module.register_buffer(name, old.to(new.device))


def quantized(scheme: Scheme | str, sharded: bool = False) -> Factory:
    """A factory for `replace_modules` that quantizes linears.

    "int4" stores the output layer in 6 bits: in 4 bits it costs more perplexity than all other
    layers together (docs/performance.md). The embedding is not a linear and is not quantized.

    Args:
        sharded: the linears are this rank's parts of the weights. All ranks must quantize at the
            same time; the codes and scales are those of the whole weights.

    Raises:
        ValueError: there is no such scheme.
    """
    found = find_scheme(scheme)

    def quantize(name: str, linear: nn.Linear) -> nn.Module:
        try:
            return quantized_linear(name, linear.weight.detach(), found.form(name), sharded)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None

    return quantize


def quantized_linear(name: str, weight: Tensor, form: Form, sharded: bool) -> nn.Module:
    """The linear of a weight in this form; see `quantized`.

    Raises:
        ValueError: the form cannot store so many columns.
    """
    if form.kind == "rows":
        return Int8Linear(weight, largest_over_ranks(name, weight) if sharded else None)
    if form.kind == "groups":
        return Int4Linear(weight, form.group)
    return BlockLinear(weight, form.bits)


def largest_over_ranks(name: str, weight: Tensor) -> Tensor | None:
    """`row_largest` of all ranks' columns together; None where this rank has whole rows."""
    columns = shard_dim(f"{name}.weight") == 1
    return tensor_parallel.max_over_ranks(row_largest(weight)) if columns else None


def check_ranks(args: Sizes, scheme: Scheme | str) -> None:
    """Check that ranks can share the columns of each weight.

    Raises:
        ValueError: they cannot; it names the weight and the possible ranks.
    """
    found = find_scheme(scheme)
    ranks, possible = tensor_parallel.size(), possible_ranks(args, found)
    if ranks in possible or 1 not in possible or ranks not in rank_counts(args):
        return
    name, (columns, unit) = next(iter(undivided(args, ranks, found.layers).items()))
    raise ValueError(
        f"{name}: {found.words()} keeps {unit} columns together, which do not divide the {columns} "
        f"columns of each of {ranks} ranks; use one of {possible} ranks, or int8"
    )
