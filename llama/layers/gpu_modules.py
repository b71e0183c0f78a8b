"""Replacements of the model's modules on an NVIDIA GPU by other kernels.

Each computes what the replaced module computes. Shapes: B rows, T positions, N outputs and K inputs
of a linear.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.layers.attention import folded_attention
from llama.layers.blocks import unpack as unpack_grid
from llama.layers.quantization import (
    codes_int4,
    dequantize_int8,
    scales_and_zeros,
    scales_and_zeros_int4,
)
from llama.layers.quantized_grad import frozen_linear
from llama.layers.quantized_linear import (
    BlockLinear,
    Int4Linear,
    Int8Linear,
    apply_to_codes,
)
from llama.layers.replace import Factory, as_class
from llama.layers.schemes import BLOCK, BLOCK_GROUP
from llama.model import RMSNorm

HALF = (torch.bfloat16, torch.float16)
# Up to this many rows of x, the kernels that widen codes in registers are faster than dequantizing
# the weight and torch's matmul. On an H100; 48 is between two numbers of rows that were measured.
INT8_ROWS = 64
INT4_ROWS = 48


def is_ampere(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU of the generation Ampere or later, which has bfloat16."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def triton_works(device: torch.device) -> bool:
    """Whether Triton's kernels run here: they need a C compiler. If not, a warning says why."""
    if find_spec("triton") is None:
        return False
    x = probe(64, device)
    try:
        return close(torch.ops.llama3.gpu_linear(x[:1], x), F.linear(x[:1], x))
    except Exception as e:  # of the compiler, the driver or Triton
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        warnings.warn(f"no Triton kernels ({reason}); they need a C compiler", stacklevel=2)
        return False


@functools.cache
def flash_works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether torch's flash kernel supports this size of heads here."""
    cache = probe(2 * head_dim, device).to(dtype).view(1, 5, 2, head_dim)
    xq = cache.flatten(2).repeat(2, 1, 2).view(2, 5, 4, head_dim).narrow(1, 0, 1).contiguous()
    cache = cache.repeat(2, 2, 1, 1)  # 2 rows of 10 positions
    ends = torch.tensor([3, 7], dtype=torch.int32, device=device)
    mask = (torch.arange(8, device=device) < ends.unsqueeze(1)).view(2, 1, 1, 8)
    keys, counts = cache.narrow(1, 0, 8), torch.arange(3, dtype=torch.int32, device=device)
    try:
        flash = torch.ops.llama3.flash_attend
        found = flash(xq, keys, keys, counts, counts * cache.shape[1], ends)
    except RuntimeError:
        return False
    return close(found, folded_attention(xq, keys, keys, mask))


class FusedRMSNorm(RMSNorm):
    """The norm as one kernel of torch: rounds once, after the multiplication by the weight."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:
            return super().forward(x)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class TritonLinear(nn.Linear):
    """A linear that for one row of x is limited only by reading its weight."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if x.numel() != x.shape[-1] or x.dtype != w.dtype or not x.is_cuda:
            return super().forward(x)
        if not w.is_contiguous():
            return super().forward(x)
        if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
            return super().forward(x)
        y: Tensor = torch.ops.llama3.gpu_linear(x.reshape(1, -1), w)
        return y.view(*x.shape[:-1], -1)


class TritonInt8Linear(Int8Linear):
    """An `Int8Linear` whose codes are widened in registers where x has few rows."""

    def multiply(self, x: Tensor) -> Tensor:
        if not x.is_cuda or x.dtype not in HALF:  # the model has been moved
            return super().multiply(x)
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= INT8_ROWS:
            y: Tensor = torch.ops.llama3.gpu_linear_int8(rows, self.q, self.scale)
            return y.view(*x.shape[:-1], -1)
        if x.dtype == torch.float16:  # sums of unscaled codes may overflow its range
            return F.linear(x, dequantize_int8(self.q, self.scale).to(x.dtype))
        return F.linear(x, self.q.to(x.dtype)).mul_(self.scale)


class TinygemmLinear(nn.Module):
    """A linear of 4 bits in the layout of torch's int4 CUDA kernel, with the same groups and codes.

    Scales and zeros are rounded to bf16; x is bf16. The kernel dequantizes in registers; see
    docs/decisions/0001-int4-on-cuda.md. It is for few rows of x: for many, the weight is
    dequantized and multiplied by torch.

    Args:
        unpack: whether `unpack_tinygemm` works on this device.
    """

    weight: Tensor
    scales_and_zeros: Tensor

    scheme = "int4"

    def __init__(self, linear: Int4Linear | BlockLinear, unpack: bool = True):
        super().__init__()
        self.n, self.unpack = linear.n, unpack
        if isinstance(linear, Int4Linear):
            self.group, codes = linear.group, codes_int4(linear.packed)
            both = scales_and_zeros_int4(linear.scale, linear.zero)
        else:
            self.group, (grid, codes) = BLOCK_GROUP, unpack_grid(linear.blocks)
            both = scales_and_zeros(grid.scale(), -grid.zero())
            codes = codes.to(torch.int32)
        inner = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
        even, odd = codes.unflatten(1, (-1, 2)).unbind(2)
        pairs = (even * 16 + odd).to(torch.uint8)
        self.register_buffer("weight", torch._convert_weight_to_int4pack(pairs, inner))
        self.register_buffer("scales_and_zeros", both)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16:
            raise RuntimeError(
                f"int4 weights that were built for bfloat16 on a GPU cannot multiply {x.dtype}; "
                "build the model with the dtype that you need"
            )
        return frozen_linear(x, self)

    def multiply(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.unpack and len(rows) > INT4_ROWS:
            return F.linear(x, self.dequantized())
        y = torch._weight_int4pack_mm(rows, self.weight, self.group, self.scales_and_zeros)
        return y.narrow(1, 0, self.n).view(*x.shape[:-1], self.n)

    def multiply_back(self, grad: Tensor) -> Tensor:
        return grad @ self.dequantized()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TinygemmLinear:
        apply_to_codes(self, fn, recurse)
        return self

    @property
    def out_features(self) -> int:
        return self.n

    @property
    def in_features(self) -> int:
        return self.scales_and_zeros.shape[0] * self.group

    def row_parts(self) -> Iterator[Tensor]:
        """See `weight_blocks`."""
        return (rows.float() for rows in self.dequantized().split(BLOCK))

    def dequantized(self) -> Tensor:
        """(N, K) bf16."""
        if not self.unpack:  # the products with unit vectors are the columns
            rows = torch.eye(self.in_features, dtype=torch.bfloat16, device=self.weight.device)
            return self.multiply(rows).t()
        from llama.layers.triton_kernels import unpack_tinygemm

        return unpack_tinygemm(self.weight, self.scales_and_zeros, self.n, self.group)


def triton_int8_or_same(name: str, linear: Int8Linear) -> nn.Module:
    """The Triton linear for a quantized one; `linear` itself if it gives other results here."""
    replacement = as_class(linear, TritonInt8Linear)
    rows = probe(linear.q.shape[1], linear.q.device)
    if all(close(replacement(x), linear(x)) for x in (rows[:1], rows)):
        return replacement
    warn_of_wrong_results(name, "the int8 kernel")
    return linear


def tinygemm_or_same(name: str, linear: Int4Linear | BlockLinear) -> nn.Module:
    """The `TinygemmLinear` of a linear; `linear` itself if it gives other results here."""
    replacement, device = TinygemmLinear(linear), next(linear.buffers()).device
    x = probe(linear.in_features, device)
    if not close(replacement(x), expected := linear(x)):
        warn_of_wrong_results(name, "torch's int4 kernel")
        return linear
    works = triton_works(device)
    replacement.unpack = works and close(F.linear(x, replacement.dequantized()), expected)
    return replacement


def blocks_on_gpu(tinygemm: bool, triton: bool) -> Factory:
    """A factory that replaces linears in blocks by what a GPU has kernels for.

    4 bits: torch's int4 kernel, if `tinygemm`. 6 bits, of the output layer: 8 bits, rounded again.
    """

    def factory(name: str, linear: BlockLinear) -> nn.Module:
        if linear.bits == 4:
            return tinygemm_or_same(name, linear) if tinygemm else linear
        widened = Int8Linear(torch.cat([rows.bfloat16() for rows in linear.row_parts()]))
        return triton_int8_or_same(name, widened) if triton else widened

    return factory


def warn_of_wrong_results(name: str, kernel: str) -> None:
    message = f"{name}: {kernel} gives wrong results on this device and is not used"
    warnings.warn(message, stacklevel=3)


def probe(K: int, device: torch.device) -> Tensor:
    """(5, K) bf16 numbers in no order, so that a kernel that permutes columns is noticed."""
    numbers = torch.arange(5 * K, device=device, dtype=torch.float32)
    return numbers.mul(0.7).sin().bfloat16().view(5, K)


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether all numbers are equal up to the rounding of bf16."""
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= 0.02 * expected.float().abs().max())
