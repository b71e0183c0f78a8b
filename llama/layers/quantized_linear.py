"""Replacements of a linear that store its weight in 8 or 4 bits. Imports no model.

Shapes: N outputs, K inputs. Each takes x (..., K) and returns (..., N) in x's dtype.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from llama.distributed import tensor_parallel
from llama.distributed.sharding import Sizes, rank_counts, shard_dim
from llama.layers.quantization import (
    codes_int4,
    linear_int4,
    linear_int8,
    quantize_int4,
    quantize_int8,
    row_largest,
    scales_and_zeros_int4,
)
from llama.layers.replace import Factory
from llama.layers.schemes import GROUPS, undivided
from llama.layers.schemes import check_scheme as check_scheme
from llama.layers.schemes import possible_ranks as possible_ranks


class Int8Linear(nn.Module):
    """A linear with one byte per weight and one scale per output.

    Args:
        weight: (N, K). On the meta device, the codes and scales are on it too.
        largest: see `quantize_int8`.
    """

    q: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, largest: Tensor | None = None):
        super().__init__()
        q, scale = quantize_int8(weight, largest)
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return linear_int8(x, self.q, self.scale)


class Int4Linear(nn.Module):
    """A linear with half a byte per weight, and one scale and one zero per group of inputs.

    Args:
        weight: (N, K). On the meta device, the codes, scales and zeros are on it too.
        group: inputs that share a scale and a zero; must divide K.
    """

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
        return linear_int4(x, self.packed, self.scale, self.zero, self.n)


class TinygemmLinear(nn.Module):
    """An `Int4Linear` in the layout of torch's int4 CUDA kernel, with the same groups. x is bf16.

    The kernel dequantizes in registers; see docs/decisions/0001-int4-on-cuda.md.
    """

    weight: Tensor
    scales_and_zeros: Tensor

    def __init__(self, linear: Int4Linear):
        super().__init__()
        self.n, self.group = linear.n, linear.group
        codes = codes_int4(linear.packed)
        inner = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
        even, odd = codes.unflatten(1, (-1, 2)).unbind(2)
        pairs = (even * 16 + odd).to(torch.uint8)
        self.register_buffer("weight", torch._convert_weight_to_int4pack(pairs, inner))
        self.register_buffer("scales_and_zeros", scales_and_zeros_int4(linear.scale, linear.zero))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = torch._weight_int4pack_mm(rows, self.weight, self.group, self.scales_and_zeros)
        return y.narrow(1, 0, self.n).view(*x.shape[:-1], self.n)


def tinygemm_or_same(name: str, linear: Int4Linear) -> nn.Module:
    """The `TinygemmLinear` of an `Int4Linear`; `linear` itself if it gives other results here."""
    replacement = TinygemmLinear(linear)
    x = torch.linspace(-1, 1, linear.packed.shape[1] * 8, device=linear.packed.device).bfloat16()
    found, expected = replacement(x.unsqueeze(0)).float(), linear(x.unsqueeze(0)).float()
    if (found - expected).abs().max() <= 0.02 * expected.abs().max():
        return replacement
    warnings.warn(
        f"{name}: torch's int4 kernel gives wrong results on this device and is not used",
        stacklevel=2,
    )
    return linear


def quantized(scheme: str, group: int = 32, sharded: bool = False) -> Factory:
    """A factory for `replace_modules` that quantizes linears.

    "int4" stores the output layer in 8 bits: in 4 bits it costs more perplexity than all other
    layers together (docs/performance.md). The embedding is not a linear and is not quantized.

    Args:
        group: inputs that share a scale and a zero in int4.
        sharded: the linears are this rank's parts of the weights. All ranks must quantize at the
            same time; the codes and scales are those of the whole weights.

    Raises:
        ValueError: there is no such scheme or group.
    """
    check_scheme(scheme, group)

    def quantize(name: str, linear: nn.Linear) -> nn.Module:
        weight = linear.weight.detach()
        if scheme == "int8" or name == "output":
            return Int8Linear(weight, largest_over_ranks(name, weight) if sharded else None)
        assert scheme == "int4", scheme
        try:
            return Int4Linear(weight, group)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None

    return quantize


def largest_over_ranks(name: str, weight: Tensor) -> Tensor | None:
    """`row_largest` of all ranks' columns together; None where this rank has whole rows."""
    columns = shard_dim(f"{name}.weight") == 1
    return tensor_parallel.max_over_ranks(row_largest(weight)) if columns else None


def check_ranks(args: Sizes, scheme: str, group: int = 32) -> None:
    """Check that int4's groups divide the columns that a rank has of each weight.

    Raises:
        ValueError: they do not; it names the weight and the possible ranks and groups.
    """
    ranks, possible = tensor_parallel.size(), possible_ranks(args, scheme, group)
    if ranks in possible or 1 not in possible or ranks not in rank_counts(args):
        return
    name, columns = next(iter(undivided(args, ranks, group).items()))
    groups = [str(g) for g in GROUPS if ranks in possible_ranks(args, scheme, g)]
    raise ValueError(
        f"{name}: groups of {group} do not divide the {columns} columns of each of {ranks} ranks; "
        f"use one of {possible} ranks"
        + (f", groups of {' or '.join(groups)}" if groups else "")
        + ", or int8"
    )
