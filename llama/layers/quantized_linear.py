"""Linears that a ready model's own are exchanged for: CPU kernels, int8, int4. It knows none.

Shapes: N outputs, K inputs. Each takes x (..., K) and gives (..., N) in x's dtype.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from llama.distributed import tensor_parallel
from llama.distributed.sharding import Sizes, rank_counts, rank_shapes, shard_dim
from llama.layers import kernels
from llama.layers.quantization import (
    GROUPS,
    codes_int4,
    linear_int4,
    linear_int8,
    quantize_int4,
    quantize_int8,
    row_largest,
    scales_and_zeros_int4,
)

SCHEMES = ("int8", "int4")


class KernelLinear(nn.Linear):
    """`nn.Linear` that reads its weight at the memory's speed where x has few rows."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight)


class Int8Linear(nn.Module):
    """A byte a weight, and a scale an output. A weight on the meta device gives empty ones.

    `largest` is as in `quantize_int8`.
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
    """Half a byte a weight, and a scale and a zero for each group of inputs. As `Int8Linear`."""

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
    """An `Int4Linear` in the layout of torch's CUDA kernel, for x of bf16; groups as they were.

    The kernel multiplies codes as they are read; see docs/decisions/0001-int4-on-cuda.md.
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


L = TypeVar("L", bound=nn.Module)


def exchange(model: nn.Module, make: Callable[[str, L], nn.Module], kind: type[L]) -> None:
    """Put `make(name, linear)` in the place of every linear of a kind, one after the other."""
    names = [name for name, m in model.named_modules() if isinstance(m, kind)]
    for name in names:  # no list of modules, which would keep all of the old ones
        linear = model.get_submodule(name)
        assert isinstance(linear, kind)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(name, linear))


def with_kernels(name: str, linear: nn.Linear) -> nn.Module:
    """The same weight behind `KernelLinear`."""
    with torch.device("meta"):
        made = KernelLinear(linear.in_features, linear.out_features, bias=False)
    made.weight = linear.weight
    return made


def with_tinygemm(name: str, linear: Int4Linear) -> nn.Module:
    """The same weight behind `TinygemmLinear`; as it was if that gives other numbers."""
    made = TinygemmLinear(linear)
    x = torch.linspace(-1, 1, linear.packed.shape[1] * 8, device=linear.packed.device).bfloat16()
    found, expected = made(x.unsqueeze(0)).float(), linear(x.unsqueeze(0)).float()
    if (found - expected).abs().max() <= 0.02 * expected.abs().max():
        return made
    warnings.warn(f"{name}: torch's int4 kernel gives other numbers here; not used", stacklevel=2)
    return linear


def quantized(
    scheme: str, group: int = 32, parts: bool = False
) -> Callable[[str, nn.Linear], nn.Module]:
    """What `exchange` takes to quantize a model.

    "int4" keeps the output layer at 8 bits: at 4 it costs more perplexity than all other layers
    together (docs/performance.md). The embedding stays as it is, since a step reads one row of it.

    Args:
        parts: the linears are this rank's parts, and all ranks quantize theirs. They get the codes
            and scales that the whole would have.

    Raises:
        ValueError: there is no such scheme.
    """
    check_scheme(scheme, group)

    def make(name: str, linear: nn.Linear) -> nn.Module:
        weight = linear.weight.detach()
        if scheme == "int8" or name == "output":
            return Int8Linear(weight, _largest(name, weight) if parts else None)
        try:
            return Int4Linear(weight, group)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None

    return make


def _largest(name: str, weight: Tensor) -> Tensor | None:
    """`row_largest` of all ranks' columns together; None where the weight has whole rows."""
    columns = shard_dim(f"{name}.weight") == 1
    return tensor_parallel.max_over_ranks(row_largest(weight)) if columns else None


def check_scheme(scheme: object, group: object = 32) -> None:
    """Raise a ValueError unless `quantized` takes them."""
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; use one of {list(SCHEMES)}")
    if type(group) is not int or group not in GROUPS:
        raise ValueError(f"groups of {group!r} weights are not possible; use one of {GROUPS}")


def undivided(args: Sizes, ranks: int, group: int) -> dict[str, int]:
    """{name: columns} of the first layer's matrices that groups of inputs do not divide."""
    shapes = rank_shapes(args, ranks).items()
    matrices = {name: s[1] for name, s in shapes if len(s) == 2 and name.startswith("layers.")}
    return {name: columns for name, columns in matrices.items() if columns % group}


def possible_ranks(args: Sizes, quantize: str | None = None, group: int = 32) -> list[int]:
    """`rank_counts`, without those whose parts of a weight int4's groups do not divide."""
    counts = rank_counts(args)
    return [n for n in counts if quantize != "int4" or not undivided(args, n, group)]
