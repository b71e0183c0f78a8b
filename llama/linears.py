"""Linears that a ready model's own are exchanged for: CPU kernels, int8, int4. It knows none.

Shapes: N outputs, K inputs. Each takes x (..., K) and gives (..., N) in x's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llama import kernels
from llama.quantize import (
    GROUPS,
    linear_int4,
    linear_int8,
    quantize_int4,
    quantize_int8,
)

SCHEMES = ("int8", "int4")


class KernelLinear(nn.Linear):
    """`nn.Linear` that reads its weight at the memory's speed where x has few rows."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight)


class Int8Linear(nn.Module):
    """A byte a weight, and a scale an output. A weight on the meta device gives empty ones."""

    q: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor):
        super().__init__()
        q, scale = quantize_int8(weight)
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
        self.n = len(weight)
        packed, scale, zero = quantize_int4(weight, group)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)

    def forward(self, x: Tensor) -> Tensor:
        return linear_int4(x, self.packed, self.scale, self.zero, self.n)


def exchange(model: nn.Module, make: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Put `make(name, linear)` in the place of every linear, one after the other."""
    linears = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, linear in linears:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(name, linear))


def with_kernels(name: str, linear: nn.Linear) -> nn.Module:
    """The same weight behind `KernelLinear`."""
    with torch.device("meta"):
        made = KernelLinear(linear.in_features, linear.out_features, bias=False)
    made.weight = linear.weight
    return made


def quantized(scheme: str, group: int = 32) -> Callable[[str, nn.Linear], nn.Module]:
    """What `exchange` takes to quantize a model.

    "int4" keeps the output layer at 8 bits: at 4 it costs more perplexity than all other layers
    together (docs/performance.md). The embedding stays as it is, since a step reads one row of it.

    Raises:
        ValueError: there is no such scheme.
    """
    check_scheme(scheme, group)

    def make(name: str, linear: nn.Linear) -> nn.Module:
        weight = linear.weight.detach()
        if scheme == "int8" or name == "output":
            return Int8Linear(weight)
        try:
            return Int4Linear(weight, group)
        except ValueError as e:
            raise ValueError(f"{name}: {e}") from None

    return make


def check_scheme(scheme: object, group: object = 32) -> None:
    """Raise a ValueError unless `quantized` takes them."""
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; use one of {list(SCHEMES)}")
    if type(group) is not int or group not in GROUPS:
        raise ValueError(f"groups of {group!r} weights are not possible; use one of {GROUPS}")
