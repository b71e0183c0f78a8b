"""Matmuls on a GPU that are limited only by reading the weight, in Triton. Knows no modules.

Imported only where a GPU is used. Shapes: M rows of x; N rows and K columns of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _one_row(  # type: ignore[no-untyped-def]
    x,
    w,
    scale,
    y,
    N,
    K,
    SCALED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: one row of x by BN rows of the weight, in steps of BK columns."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    sums = tl.zeros((BN, BK), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        valid = (n[:, None] < N) & (k[None, :] < K)
        weight = tl.load(w + n[:, None].to(tl.int64) * K + k[None, :], mask=valid, other=0)
        row = tl.load(x + k, mask=k < K, other=0.0)
        sums += weight.to(tl.float32) * row.to(tl.float32)[None, :]
    out = tl.sum(sums, 1)
    if SCALED:
        out *= tl.load(scale + n, mask=n < N, other=0.0)
    tl.store(y + n, out.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def _rows_int8(  # type: ignore[no-untyped-def]
    x,
    w,
    scale,
    y,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: BM rows of x by BN rows of the weight, by tensor cores."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    sums = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        valid = (n[None, :] < N) & (k[:, None] < K)
        weight = tl.load(w + n[None, :].to(tl.int64) * K + k[:, None], mask=valid, other=0)
        valid = (m[:, None] < M) & (k[None, :] < K)
        rows = tl.load(x + m[:, None] * K + k[None, :], mask=valid, other=0.0)
        sums = tl.dot(rows, weight.to(rows.dtype), sums)
    sums *= tl.load(scale + n, mask=n < N, other=0.0)[None, :]
    valid = (m[:, None] < M) & (n[None, :] < N)
    tl.store(y + m[:, None] * N + n[None, :], sums.to(y.dtype.element_ty), mask=valid)


@triton.jit
def _unpack_tinygemm(  # type: ignore[no-untyped-def]
    words,
    scales_and_zeros,
    y,
    columns,
    K,
    G: tl.constexpr,
    TILES: tl.constexpr,
    BK: tl.constexpr,
):
    """One program: one row of the weight, BK columns of it. See `unpack_tinygemm`."""
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    inside = k < K
    lane = (n % 8) * 4 + k % 8 // 2
    block = (n // 8 * (K // (16 * TILES)) + k // (16 * TILES)) * 32 + lane
    word = tl.load(words + block * (TILES // 2) + k % (16 * TILES) // 32, mask=inside, other=0)
    code = (word >> (4 * (k % 32 // 8 + k % 2 * 4))) & 15
    at = scales_and_zeros + (k // G * columns + n) * 2
    scale = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(at + 1, mask=inside, other=0.0).to(tl.float32)
    weight = (code - 8).to(tl.float32) * scale + zero
    tl.store(y + n * K + k, weight.to(y.dtype.element_ty), mask=inside)


# The sizes of blocks below were the fastest of those tried on an H100.


def linear_one_row(x: Tensor, w: Tensor) -> Tensor:
    """x (1, K) times the transpose of a weight (N, K): (1, N)."""
    return _run_one_row(x, w, w, scaled=False)


def linear_int8(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """A few rows x (M, K) times the transpose of a `quantize_int8` weight: (M, N)."""
    M, (N, K) = len(x), q.shape
    if M == 1:
        return _run_one_row(x, q, scale, scaled=True)
    y = x.new_empty(M, N)
    rows = max(16, 1 << (M - 1).bit_length())
    BN, BK = (64, 128) if N >= 8192 else (16, 256)
    grid = (triton.cdiv(N, BN),)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _rows_int8[grid](
            *(x.contiguous(), q, scale, y, M, N, K, rows, BN, BK), STAGES=4, num_warps=4
        )
    return y


def _run_one_row(x: Tensor, w: Tensor, scale: Tensor, scaled: bool) -> Tensor:
    N, K = w.shape
    y = x.new_empty(1, N)
    options: dict[str, Any] = {"num_warps": 2 if scaled else 4}
    with torch.cuda.device_of(x):
        _one_row[(triton.cdiv(N, 4),)](x, w, scale, y, N, K, scaled, 4, 512, STAGES=4, **options)
    return y


def unpack_tinygemm(words: Tensor, scales_and_zeros: Tensor, n: int, group: int) -> Tensor:
    """The first n rows of a weight in the layout of torch's int4 kernel, dequantized: (n, K) bf16.

    Args:
        words: of `torch._convert_weight_to_int4pack`: (N / 8, K / (16 tiles), 32, tiles / 2) int32.
            Lane t of the 32 holds row t // 4 of 8, and of each 32 columns those that are
            2 (t % 4) or 2 (t % 4) + 1 modulo 8; the even ones are in the lower 16 bits.
        scales_and_zeros: (K / group, N, 2), of `scales_and_zeros_int4`.
    """
    tiles = words.shape[3] * 2
    K = words.shape[1] * 16 * tiles
    y = scales_and_zeros.new_empty(n, K)
    grid = (n, triton.cdiv(K, 1024))
    columns = scales_and_zeros.shape[1]
    with torch.cuda.device_of(words):
        _unpack_tinygemm[grid](
            *(words, scales_and_zeros, y, columns, K, group, tiles), BK=1024, num_warps=4
        )
    return y
