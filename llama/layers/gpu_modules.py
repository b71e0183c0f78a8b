"""Replacements of the model's modules on an NVIDIA GPU, where launching a kernel takes microseconds.

Fewer and larger matmuls, and Triton's for quantized weights. Each computes what the replaced module
computes. Shapes: B rows, T positions, N outputs and K inputs of a linear, G inputs of a group.
"""

from __future__ import annotations

import warnings
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.distributed.tensor_parallel import copy_to_ranks, reduce_from_ranks
from llama.layers.kernel_modules import rotate, swiglu
from llama.layers.quantization import untile
from llama.layers.quantized_linear import Int4Linear, Int8Linear
from llama.layers.replace import as_class
from llama.model import Attention, FeedForward, RMSNorm

HALF = (torch.bfloat16, torch.float16)
# Up to this many rows, reading a quantized weight takes longer than the arithmetic, and Triton's
# kernels are used. For more, the weight is dequantized and multiplied by torch.
MAX_ROWS = 64


def supports_triton(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU with bfloat16 (Ampere or later), and Triton is installed."""
    if torch.version.hip is not None or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


class FusedRMSNorm(RMSNorm):
    """The norm as one kernel of torch: rounds once, after the multiplication by the weight."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:
            return super().forward(x)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


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


def joined_heads(name: str, attention: Attention) -> nn.Module:
    """A factory for `replace_modules`; the module itself where its linears cannot be joined."""
    joined = join(attention.wq, attention.wk, attention.wv)
    if joined is None:
        return attention
    replacement = as_class(attention, JoinedHeads)
    del replacement.wq, replacement.wk, replacement.wv
    replacement.wqkv = joined
    return replacement


def joined_feed_forward(name: str, feed_forward: FeedForward) -> nn.Module:
    """A factory for `replace_modules`; the module itself where its linears cannot be joined."""
    joined = join(feed_forward.w1, feed_forward.w3)
    if joined is None:
        return feed_forward
    replacement = as_class(feed_forward, JoinedFeedForward)
    del replacement.w1, replacement.w3
    replacement.w13 = joined
    return replacement


def join(*linears: nn.Module) -> nn.Module | None:
    """One linear with the outputs of several one after the other; None where that is impossible."""
    first, kind = linears[0], type(linears[0])
    names = {nn.Linear: ("weight",), Int8Linear: ("q", "scale")}.get(kind, ())
    if kind is Int4Linear:
        assert isinstance(first, Int4Linear)
        # Tiles hold 16 rows: only the last linear may have an unfinished one.
        if all(linear.n % 16 == 0 for linear in linears[:-1] if isinstance(linear, Int4Linear)):
            names = ("packed", "scale", "zero")
    if not names or any(type(linear) is not kind for linear in linears):
        return None
    joined = as_class(first, kind)
    joined._parameters, joined._buffers = dict(first._parameters), dict(first._buffers)
    for name in names:
        whole = torch.cat([getattr(linear, name).detach() for linear in linears])
        if kind is nn.Linear:
            setattr(joined, name, nn.Parameter(whole, requires_grad=False))
        else:
            setattr(joined, name, whole)
    if isinstance(joined, nn.Linear):
        joined.out_features = len(joined.weight)
    if isinstance(joined, Int4Linear):
        joined.n = sum(linear.n for linear in linears if isinstance(linear, Int4Linear))
    return joined


class TritonInt8Linear(Int8Linear):
    """An `Int8Linear` on a GPU: x in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= MAX_ROWS:
            y: Tensor = torch.ops.llama3.gpu_linear_int8(rows, self.q, self.scale)
            return y.view(*x.shape[:-1], -1)
        if x.dtype == torch.float16:  # sums of unscaled codes may overflow its range
            return F.linear(x, self.q.to(x.dtype) * self.scale.to(x.dtype).unsqueeze(1))
        return F.linear(x, self.q.to(x.dtype)) * self.scale.to(x.dtype)


class TritonInt4Linear(nn.Module):
    """An `Int4Linear` in the order in which a GPU reads it: x in half precision.

    Args:
        linear: its codes, scales and zeros are kept bit for bit.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, linear: Int4Linear):
        super().__init__()
        from llama.layers.triton_kernels import gpu_words

        self.register_buffer("words", gpu_words(linear.packed, linear.n))
        self.register_buffer("scale", untile(linear.scale)[: linear.n].contiguous())
        self.register_buffer("zero", untile(linear.zero)[: linear.n].contiguous())

    def forward(self, x: Tensor) -> Tensor:
        from llama.layers.triton_kernels import unpack_int4

        rows = x.reshape(-1, x.shape[-1])
        if len(rows) <= MAX_ROWS:
            y: Tensor = torch.ops.llama3.gpu_linear_int4(rows, self.words, self.scale, self.zero)
            return y.view(*x.shape[:-1], -1)
        return F.linear(x, unpack_int4(self.words, self.scale, self.zero, x.dtype))


def on_triton(name: str, linear: Int8Linear | Int4Linear) -> nn.Module:
    """The Triton linear for a quantized one; `linear` itself if its results differ here."""
    if isinstance(linear, Int4Linear):
        replacement: nn.Module = TritonInt4Linear(linear)
        device, K = linear.packed.device, linear.packed.shape[1] * 8
    else:
        replacement = as_class(linear, TritonInt8Linear)
        device, K = linear.q.device, linear.q.shape[1]
    x = torch.linspace(-1, 1, 5 * K, device=device).bfloat16().view(5, K)
    for rows in (x[:1], x):  # the kernels for few and for more rows
        found, expected = replacement(rows).float(), linear(rows).float()
        if not bool((found - expected).abs().max() <= 0.02 * expected.abs().max()):
            warnings.warn(f"{name}: Triton's matmul is wrong on this device and is not used", stacklevel=2)
            return linear
    return replacement
