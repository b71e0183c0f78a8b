"""Operators for NVIDIA's GPUs, which torch.compile calls as they are. Knows nothing about models.

`load()` registers them:

    llama3::flash_attend(xq, keys, values, *spans)   as `FlashAttention` in layers/attention.py
    llama3::gpu_linear(x, w)                         one row x (1, K) by a plain weight
    llama3::gpu_linear_int8(x, q, scale)             a few rows x (M, K) by codes of int8

Shapes: B rows, T new positions, S positions read, D head_dim, H / K query / key-value heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@functools.cache
def load() -> None:
    """Register the operators."""
    # The first call of such an operator would import it, and the import keeps the frames of its
    # callers, with their models, until the next garbage collection.
    import torch._dynamo

    def register(name: str, function: Callable[..., Tensor], fake: Callable[..., Any]) -> None:
        operator = torch.library.custom_op(f"llama3::{name}", function, mutates_args=())
        operator.register_fake(fake)

    register("flash_attend", flash_attend, lambda xq, *others: xq.new_empty(xq.shape))
    register("gpu_linear", gpu_linear, lambda x, w: x.new_empty(1, len(w)))
    register("gpu_linear_int8", gpu_linear_int8, lambda x, q, scale: x.new_empty(len(x), len(q)))


def gpu_linear(x: Tensor, w: Tensor) -> Tensor:
    """One row x (1, K) times the transpose of a contiguous weight (N, K): (1, N)."""
    from llama.layers import triton_kernels

    return triton_kernels.linear_one_row(x, w)


def gpu_linear_int8(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """A few rows x (M, K) times the transpose of a `quantize_int8` weight: (M, N)."""
    from llama.layers import triton_kernels

    return triton_kernels.linear_int8(x, q, scale)


def flash_attend(
    xq: Tensor, keys: Tensor, values: Tensor, queries: Tensor, begins: Tensor, ends: Tensor
) -> Tensor:
    """Causal attention of each row's last T positions, by torch's flash kernel, arXiv:2307.08691.

    It takes rows of different lengths as parts of one sequence. Where T = 1, several
    multiprocessors share the keys of a row.

    Args:
        xq: (B, T, H, D) in half precision.
        keys, values: (B, S, K, D), rows of a cache.
        queries, begins, ends: `queries`, `keys` and `ends` of `CacheSlice`.

    Returns:
        (B, T, H, D).
    """
    B, T, H, D = xq.shape
    S, K = keys.shape[1:3]
    room = keys.stride(0) // keys.stride(1)  # positions between the beginnings of two rows
    whole = ((B - 1) * room + S, K, D)
    keys, values = (x.as_strided(whole, x.stride()[1:]) for x in (keys, values))
    flash = torch.ops.aten._flash_attention_forward
    out: Tensor = flash(
        *(xq.reshape(B * T, H, D), keys, values, queries, begins, T, S),
        *(0.0, T > 1, False),  # dropout, causal, debug mask
        seqused_k=ends,
    )[0]
    return out.view(B, T, H, D)
