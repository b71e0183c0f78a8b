"""Weights of 8 and 4 bits: matrix -> codes and scales, and back. Knows nothing about models.

Shapes: N rows (outputs) and K columns of a weight matrix, T tiles of 16 rows, G columns a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.layers import kernels

TILE = 16  # rows of an int4 weight that lie together
GROUPS = (32, 64, 128)
# Rows that are quantized, or made plain where x has many rows, at once: those of common widths
# stay in the cache.
BLOCK = 512


def _by_rows(quantize: Callable[..., tuple[Tensor, ...]], *given: Tensor) -> tuple[Tensor, ...]:
    """`quantize(w, ...)` in blocks of rows: its fp32 and int64 are never as large as w."""
    device = given[0].device
    if device.type == "meta":
        return quantize(*given)
    likes = quantize(*(t.to("meta") for t in given))
    whole = tuple(torch.empty_like(t, device=device) for t in likes)
    start = 0
    for rows in zip(*(t.split(BLOCK) for t in given), strict=True):
        parts = quantize(*rows)
        for t, part in zip(whole, parts, strict=True):
            t[start : start + len(part)] = part
        start += len(parts[0])
    return whole


def row_largest(w: Tensor) -> Tensor:
    """The largest magnitude of each row: (N, K) -> (N,) fp32."""
    [largest] = _by_rows(lambda rows: (rows.float().abs().amax(dim=1),), w)
    return largest


def quantize_int8(w: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric, one scale a row: (N, K) -> codes (N, K) int8 and scales (N,) fp32.

    Args:
        largest: `row_largest` of a wider weight, of whose columns w is a part.
    """
    given = (w,) if largest is None else (w, largest)
    q, scale = _by_rows(_quantize_int8, *given)
    return q, scale


def _quantize_int8(w: Tensor, largest: Tensor | None = None) -> tuple[Tensor, ...]:
    w = w.float()
    largest = w.abs().amax(dim=1) if largest is None else largest
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (w / scale.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scale


def dequantize_int8(q: Tensor, scale: Tensor) -> Tensor:
    """(N, K) fp32."""
    return q.float() * scale.unsqueeze(1)


def linear_int8(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """x (..., K) times the transpose of a `quantize_int8` weight: (..., N) in x's dtype."""
    if kernels.use("int8", x):
        y: Tensor = torch.ops.llama3.linear_int8(x, q, scale)
        return y
    if (wide := _served(x)) is not x:
        return linear_int8(wide, q, scale).to(x.dtype)
    if x.dtype == torch.float16:  # whose range unscaled products may leave
        return F.linear(x, dequantize_int8(q, scale).to(x.dtype))
    if x.device.type != "cpu" and torch.compiler.is_compiling():  # which fuses it for one row
        return (F.linear(x, q.to(x.dtype)) * scale).to(x.dtype)
    parts = zip(q.split(BLOCK), scale.split(BLOCK), strict=True)
    return torch.cat([F.linear(x, widen_int8(x, part)).mul_(s) for part, s in parts], dim=-1)


def _served(x: Tensor) -> Tensor:
    """float16 as float32 where kernels serve, which take no float16; else x itself."""
    if x.dtype == torch.float16 and x.device.type == "cpu" and kernels.takes(wide := x.float()):
        return wide
    return x


def widen_int8(x: Tensor, q: Tensor) -> Tensor:
    """Codes in x's dtype; in bf16 too they are exact."""
    if x.dtype == torch.bfloat16 and kernels.takes(x):
        w: Tensor = torch.ops.llama3.widen_int8(q)
        return w
    return q.to(x.dtype)


def quantize_int4(w: Tensor, group: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric, in groups along K: w is about code * scale + zero, codes 0 to 15.

    Rows are padded with zeros to whole tiles.

    Returns:
        packed: (T, K / 8, 16) int32; bits 4i to 4i + 3 of packed[t, b, r] are the code of row
            16t + r, column 8b + i: a tile is read front to back, 16 rows side by side.
        scale, zero: (T, K / G, 16) bf16. Codes are rounded to these, not to what they were before
            their own rounding.
    """
    K = w.shape[1]
    if group not in GROUPS or K % group:
        raise ValueError(
            f"groups of {group} do not divide {K} columns; use another of {GROUPS}, or int8"
        )
    packed, scale, zero = _by_rows(lambda rows: _quantize_int4(rows, group), w)
    return packed, scale, zero


def _quantize_int4(w: Tensor, group: int) -> tuple[Tensor, ...]:
    N, K = w.shape
    w = F.pad(w.float(), (0, 0, 0, -N % TILE)).view(-1, TILE, K // group, group)
    low, high = w.amin(dim=3), w.amax(dim=3)
    scale = ((high - low) / 15).bfloat16()
    zero = low.bfloat16()
    step = scale.float().where(scale > 0, 1).unsqueeze(3)
    codes = ((w - zero.float().unsqueeze(3)) / step).round().clamp(0, 15).to(torch.int64)
    codes = codes.view(-1, TILE, K // 8, 8).transpose(1, 2)
    places = torch.arange(0, 32, 4, device=w.device)
    packed = torch.bitwise_left_shift(codes, places).sum(dim=3).to(torch.int32)
    return packed, scale.transpose(1, 2).contiguous(), zero.transpose(1, 2).contiguous()


def codes_int4(packed: Tensor) -> Tensor:
    """The codes of all rows, those that fill the last tile included: (16 T, K) int32."""
    T, blocks, _ = packed.shape
    places = torch.arange(0, 32, 4, device=packed.device, dtype=packed.dtype)
    codes = torch.bitwise_right_shift(packed.unsqueeze(3), places) & 15
    return codes.transpose(1, 2).reshape(T * TILE, blocks * 8).to(torch.int32)


def by_row(t: Tensor) -> Tensor:
    """Scales or zeros of all rows: (T, K / G, 16) -> (16 T, K / G). Packed codes alike."""
    rows: Tensor = t.transpose(1, 2).flatten(0, 1)
    return rows


def rows_int4(t: Tensor, start: int, stop: int) -> Tensor:
    """Codes, scales or zeros of rows `start`:`stop` in tiles of their own; whole ones are views."""
    first = start // TILE
    t = t[first : -(-stop // TILE)]
    if start % TILE == stop % TILE == 0:
        return t
    rows = by_row(t)[start - first * TILE : stop - first * TILE]
    tiles = F.pad(rows, (0, 0, 0, -len(rows) % TILE)).unflatten(0, (-1, TILE))
    made: Tensor = tiles.transpose(1, 2).contiguous()
    return made


def dequantize_int4(packed: Tensor, scale: Tensor, zero: Tensor, n: int) -> Tensor:
    """The first n rows: (n, K) fp32."""
    codes = codes_int4(packed).unflatten(1, (scale.shape[1], -1))
    w: Tensor = codes * by_row(scale).float().unsqueeze(2) + by_row(zero).float().unsqueeze(2)
    return w.flatten(1)[:n]


def scales_and_zeros_int4(scale: Tensor, zero: Tensor) -> Tensor:
    """Those of a `quantize_int4` weight as torch's own int4 products take them.

    There a weight is (code - 8) * scale + zero, so the zero is another, rounded to bf16 anew.

    Returns:
        (K / G, 16 T, 2) bf16.
    """
    middle = (zero.float() + 8 * scale.float()).bfloat16()
    both = torch.stack((by_row(scale), by_row(middle)), dim=2).transpose(0, 1)
    return both.clone(memory_format=torch.contiguous_format)


def linear_int4(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, n: int) -> Tensor:
    """x (..., K) times the transpose of a `quantize_int4` weight of n rows: (..., n)."""
    if kernels.use("int4", x):
        y: Tensor = torch.ops.llama3.linear_int4(x, packed, scale, zero, n)
        return y
    if (wide := _served(x)) is not x:
        return linear_int4(wide, packed, scale, zero, n).to(x.dtype)
    parts = zip(*(t.split(BLOCK // TILE) for t in (packed, scale, zero)), strict=True)
    rows = [BLOCK] * (n // BLOCK) + [n % BLOCK] * (n % BLOCK > 0)
    weights = (unpack_int4(x, p, s, z, m) for (p, s, z), m in zip(parts, rows, strict=True))
    return torch.cat([F.linear(x, w) for w in weights], dim=-1)


def unpack_int4(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, n: int) -> Tensor:
    """`dequantize_int4` in x's dtype."""
    if kernels.takes(x):
        w: Tensor = torch.ops.llama3.unpack_int4(x, packed, scale, zero, n)
        return w
    return dequantize_int4(packed, scale, zero, n).to(x.dtype)
