"""Matmuls with 8 and 4 bit weights on a GPU, in Triton. Imported only where a GPU is used.

Reading the weight limits a matmul of few rows, so the codes are widened in registers. Shapes: M rows of x,
N rows and K columns of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.layers.quantization import codes_int4

# Up to this many rows are multiplied by plain arithmetic, more by tensor cores.
FEW_ROWS = 4

Config = dict[str, int]  # of a kernel: the sizes of its blocks, and Triton's own options


@triton.jit
def _int8_few(  # type: ignore[no-untyped-def]
    x,
    q,
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
    """One program: BM rows of x by BN rows of the weight, in steps of BK columns."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    acc = tl.zeros((BM, BN, BK), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        codes = tl.load(
            q + n[:, None].to(tl.int64) * K + k[None, :],
            mask=(n[:, None] < N) & (k[None, :] < K),
            other=0,
        )
        rows = tl.load(
            x + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0
        )
        acc += codes.to(tl.float32)[None, :, :] * rows.to(tl.float32)[:, None, :]
    sums = tl.sum(acc, 2) * tl.load(scale + n, mask=n < N, other=0.0)[None, :]
    tl.store(
        y + m[:, None] * N + n[None, :],
        sums.to(y.dtype.element_ty),
        mask=(m[:, None] < M) & (n[None, :] < N),
    )


@triton.jit
def _int8_dot(  # type: ignore[no-untyped-def]
    x,
    q,
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
    """As `_int8_few`, by tensor cores."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        codes = tl.load(
            q + n[None, :].to(tl.int64) * K + k[:, None],
            mask=(n[None, :] < N) & (k[:, None] < K),
            other=0,
        )
        rows = tl.load(
            x + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0
        )
        acc = tl.dot(rows, codes.to(rows.dtype), acc)
    sums = acc * tl.load(scale + n, mask=n < N, other=0.0)[None, :]
    tl.store(
        y + m[:, None] * N + n[None, :],
        sums.to(y.dtype.element_ty),
        mask=(m[:, None] < M) & (n[None, :] < N),
    )


@triton.jit
def _code(word, i: tl.constexpr):  # type: ignore[no-untyped-def]
    """128 + the i-th code of each word, in fp32: the code's 4 bits, moved into the mantissa of 128."""
    bits = word << (16 - 4 * i) if i <= 4 else word >> (4 * i - 16)
    return ((bits & 0x000F0000) | 0x43000000).to(tl.float32, bitcast=True)


@triton.jit
def _int4_few(  # type: ignore[no-untyped-def]
    x,
    words,
    scale,
    zero,
    y,
    M,
    N,
    K,
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: BM rows of x by BN rows of the weight, in steps of BG x 32 columns."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    w = tl.arange(0, 4)
    acc = tl.zeros((BM, BN, BG), tl.float32)
    for g0 in tl.range(0, K // 32, BG, num_stages=STAGES):
        g = g0 + tl.arange(0, BG)
        inside = (n[:, None] < N) & (g[None, :] < K // 32)
        at = (n[:, None].to(tl.int64) * (K // 32) + g[None, :])[:, :, None] * 4 + w[None, None, :]
        word = tl.load(words + at, mask=inside[:, :, None], other=0)
        group = n[:, None] * (K // G) + g[None, :] // (G // 32)
        s = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(zero + group, mask=inside, other=0.0).to(tl.float32)
        part = tl.zeros((BM, BN, BG, 4), tl.float32)
        total = tl.zeros((BM, BG, 4), tl.float32)
        for i in tl.static_range(8):
            column = m[:, None, None] * K + g[None, :, None] * 32 + 4 * i + w[None, None, :]
            valid = (m[:, None, None] < M) & (g[None, :, None] < K // 32)
            values = tl.load(x + column, mask=valid, other=0.0).to(tl.float32)
            part += values[:, None, :, :] * _code(word, i)[None, :, :, :]
            total += values
        sums = tl.sum(part, 3)
        totals = tl.sum(total, 2)[:, None, :]
        acc += sums * s[None, :, :] + totals * (z - 128.0 * s)[None, :, :]
    tl.store(
        y + m[:, None] * N + n[None, :],
        tl.sum(acc, 2).to(y.dtype.element_ty),
        mask=(m[:, None] < M) & (n[None, :] < N),
    )


@triton.jit
def _int4_dot(  # type: ignore[no-untyped-def]
    x,
    words,
    scale,
    zero,
    y,
    M,
    N,
    K,
    G: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BG: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `_int4_few`, by tensor cores."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    w = tl.arange(0, 4)
    k = tl.arange(0, BG * 4)
    acc = tl.zeros((BN, BM), tl.float32)
    for g0 in tl.range(0, K // 32, BG, num_stages=STAGES):
        g = g0 + tl.arange(0, BG)
        inside = (n[:, None] < N) & (g[None, :] < K // 32)
        at = (n[:, None].to(tl.int64) * (K // 32) + g[None, :])[:, :, None] * 4 + w[None, None, :]
        word = tl.load(words + at, mask=inside[:, :, None], other=0)
        group = n[:, None] * (K // G) + g[None, :] // (G // 32)
        s = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(zero + group, mask=inside, other=0.0).to(tl.float32) - 128.0 * s
        for i in tl.static_range(8):
            column = (g0 + k // 4) * 32 + 4 * i + k % 4
            valid = (m[None, :] < M) & (column[:, None] < K)
            values = tl.load(x + m[None, :] * K + column[:, None], mask=valid, other=0.0)
            weight = _code(word, i) * s[:, :, None] + z[:, :, None]
            acc = tl.dot(tl.reshape(weight, (BN, BG * 4)).to(values.dtype), values, acc)
    tl.store(
        y + m[None, :] * N + n[:, None],
        acc.to(y.dtype.element_ty),
        mask=(m[None, :] < M) & (n[:, None] < N),
    )


@triton.jit
def _unpack_int4(words, scale, zero, y, N, K, G: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program: BN rows of the weight, BG x 32 columns of them."""
    n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    g = tl.program_id(1) * BG + tl.arange(0, BG)
    w = tl.arange(0, 4)
    i = tl.arange(0, 8)
    inside = (n[:, None] < N) & (g[None, :] < K // 32)
    at = (n[:, None] * (K // 32) + g[None, :])[:, :, None] * 4 + w[None, None, :]
    word = tl.load(words + at, mask=inside[:, :, None], other=0)
    group = n[:, None] * (K // G) + g[None, :] // (G // 32)
    s = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(zero + group, mask=inside, other=0.0).to(tl.float32)
    code = (word[:, :, None, :] >> (4 * i)[None, None, :, None]) & 15
    weight = code.to(tl.float32) * s[:, :, None, None] + z[:, :, None, None]
    column = g[None, :, None, None] * 32 + 4 * i[None, None, :, None] + w[None, None, None, :]
    tl.store(
        y + n[:, None, None, None] * K + column,
        weight.to(y.dtype.element_ty),
        mask=inside[:, :, None, None],
    )


def linear_int8(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """x (M, K), times the transpose of a `quantize_int8` weight: (M, N)."""
    return run_int8(x, q, scale, *int8_kernel(len(x), len(q)))


def int8_kernel(M: int, N: int) -> tuple[Any, Config]:
    """The kernel for M rows by N, and the sizes of its blocks."""
    if M <= FEW_ROWS:
        return _int8_few, {"BM": _power(M), "BN": 4, "BK": 512, "STAGES": 4, "num_warps": 2}
    blocks = {"BN": 64, "BK": 128} if N >= 8192 else {"BN": 16, "BK": 256}
    return _int8_dot, {"BM": max(16, _power(M)), **blocks, "STAGES": 4, "num_warps": 4}


def run_int8(x: Tensor, q: Tensor, scale: Tensor, kernel: Any, config: Config) -> Tensor:
    M, (N, K) = len(x), q.shape
    y = x.new_empty(M, N)
    kernel[(triton.cdiv(N, config["BN"]),)](x, q, scale, y, M, N, K, **config)
    return y


def gpu_words(packed: Tensor, n: int) -> Tensor:
    """Codes of the first n rows, in the order in which a GPU reads them.

    Returns:
        (n, K / 32, 4) int32; bits 4i to 4i + 3 of words[r, g, w] are the code of row r, column
        32g + 4i + w: a thread reads 32 columns as 16 bytes, and each 4 of them meet 4 neighbours of x.
    """
    codes = codes_int4(packed)[:n].unflatten(1, (-1, 8, 4))
    places = torch.arange(0, 32, 4, device=packed.device, dtype=torch.int32).unsqueeze(1)
    return torch.bitwise_left_shift(codes, places).sum(2).to(torch.int32)


def linear_int4(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x (M, K), times the transpose of a weight of 4 bits: (M, N).

    Args:
        words: (N, K / 32, 4), see `gpu_words`.
        scale, zero: (N, K / G).
    """
    return run_int4(x, words, scale, zero, *int4_kernel(len(x)))


def int4_kernel(M: int) -> tuple[Any, Config]:
    """The kernel for M rows, and the sizes of its blocks."""
    if M <= FEW_ROWS:
        return _int4_few, {"BM": _power(M), "BN": 16, "BG": 32, "STAGES": 3, "num_warps": 4}
    return _int4_dot, {"BM": max(16, _power(M)), "BN": 64, "BG": 16, "STAGES": 3, "num_warps": 4}


def run_int4(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, kernel: Any, config: Config
) -> Tensor:
    (M, K), N = x.shape, len(words)
    y = x.new_empty(M, N)
    grid = (triton.cdiv(N, config["BN"]),)
    kernel[grid](x, words, scale, zero, y, M, N, K, K // scale.shape[1], **config)
    return y


def unpack_int4(words: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """The dequantized weight: (N, K). Arguments as in `linear_int4`."""
    N, K = len(words), words.shape[1] * 32
    w = torch.empty(N, K, dtype=dtype, device=words.device)
    grid = (triton.cdiv(N, 8), triton.cdiv(K // 32, 32))
    _unpack_int4[grid](words, scale, zero, w, N, K, K // scale.shape[1], BN=8, BG=32, num_warps=4)
    return w


def _power(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()
