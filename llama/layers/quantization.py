"""Weights of 8 and 4 bits: matrix -> codes and scales, and back. Knows nothing about models.

Shapes: N rows (outputs) and K columns of a weight matrix, T tiles of 16 rows, G columns a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.layers import kernels
from llama.layers.schemes import BLOCK, GROUPS, TILE


def _by_rows(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """`function(*inputs)` in blocks of rows, so that its temporary tensors stay small."""
    device, n = inputs[0].device, len(inputs[0])
    # Not computed on the meta device: that would import torch._dynamo, see `without_memory`.
    samples = [torch.zeros(TILE, *t.shape[1:], dtype=t.dtype, device="cpu") for t in inputs]
    results = tuple(
        torch.empty(-(-n * len(part) // TILE), *part.shape[1:], dtype=part.dtype, device=device)
        for part in function(*samples)
    )
    if device.type == "meta":
        return results
    start = 0
    for rows in zip(*(t.split(BLOCK) for t in inputs), strict=True):
        parts = function(*rows)
        for result, part in zip(results, parts, strict=True):
            result[start : start + len(part)] = part
        start += len(parts[0])
    return results


def row_largest(w: Tensor) -> Tensor:
    """The largest magnitude of each row: (N, K) -> (N,) fp32."""
    [largest] = _by_rows(lambda rows: (rows.float().abs().amax(dim=1),), w)
    return largest


def quantize_int8(w: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric, one scale a row: (N, K) -> codes (N, K) int8 and scales (N,) fp32.

    Args:
        largest: `row_largest` of the whole weight, if w has only some of its columns.
    """
    q, scale = _by_rows(_quantize_int8, *((w,) if largest is None else (w, largest)))
    return q, scale


def _quantize_int8(w: Tensor, largest: Tensor | None = None) -> tuple[Tensor, ...]:
    w = w.float()
    largest = w.abs().amax(dim=1) if largest is None else largest
    scale = divide(largest.clamp(min=torch.finfo(torch.float32).tiny), 127)
    return (w / scale.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scale


def divide(x: Tensor, by: float) -> Tensor:
    """x / by, rounded alike on all devices: a GPU multiplies by the inverse of a Python number."""
    return x / torch.full((), by, dtype=x.dtype, device=x.device)


def dequantize_int8(q: Tensor, scale: Tensor) -> Tensor:
    """(N, K) fp32."""
    return q.float() * scale.unsqueeze(1)


def linear_int8(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """x (..., K) times the transpose of a `quantize_int8` weight: (..., N) in x's dtype."""
    if kernels.is_fastest("int8", x):
        y: Tensor = torch.ops.llama3.linear_int8(x, q, scale)
        return y
    if (wide := _fp16_to_fp32(x)) is not x:
        return linear_int8(wide, q, scale).to(x.dtype)
    if x.dtype == torch.float16:  # sums of unscaled codes may overflow its range
        return F.linear(x, dequantize_int8(q, scale).to(x.dtype))
    if x.device.type != "cpu" and torch.compiler.is_compiling():  # for one row, inductor fuses this
        return (F.linear(x, q.to(x.dtype)) * scale).to(x.dtype)
    parts = zip(q.split(BLOCK), scale.split(BLOCK), strict=True)
    return side_by_side((F.linear(x, widen_int8(x, part)).mul_(s) for part, s in parts), len(q))


def side_by_side(blocks: Iterable[Tensor], n: int) -> Tensor:
    """Blocks of outputs (..., N') as one tensor (..., n). No more than one block is kept beside."""
    whole, start = None, 0
    for block in blocks:
        if block.shape[-1] == n:
            return block
        if whole is None:
            whole = block.new_empty(*block.shape[:-1], n)
        whole.narrow(-1, start, block.shape[-1]).copy_(block)
        start += block.shape[-1]
    assert whole is not None and start == n
    return whole


def _fp16_to_fp32(x: Tensor) -> Tensor:
    """float16 as float32 where the CPU kernels can run, which have no float16; else x itself."""
    if x.dtype == torch.float16 and x.device.type == "cpu" and kernels.supports(wide := x.float()):
        return wide
    return x


def widen_int8(x: Tensor, q: Tensor) -> Tensor:
    """Codes in x's dtype; every dtype represents them exactly."""
    if x.dtype == torch.bfloat16 and kernels.supports(x):
        w: Tensor = torch.ops.llama3.widen_int8(q)
        return w
    return q.to(x.dtype)


def quantize_int4(w: Tensor, group: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric, in groups along K: w is about code * scale + zero, codes 0 to 15.

    Rows are padded with zeros to whole tiles.

    Returns:
        packed: (T, K / 8, 16) int32; bits 4i to 4i + 3 of packed[t, b, r] are the code of row
            16t + r, column 8b + i: a tile is contiguous, with its 16 rows interleaved.
        scale, zero: (T, K / G, 16) bf16. The codes are computed from these rounded values.
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
    scale = divide(high - low, 15).bfloat16()
    zero = low.bfloat16()
    step = scale.float().where(scale > 0, 1).unsqueeze(3)
    codes = ((w - zero.float().unsqueeze(3)) / step).round().clamp(0, 15).to(torch.int64)
    codes = codes.view(-1, TILE, K // 8, 8).transpose(1, 2)
    places = torch.arange(0, 32, 4, device=w.device)
    packed = torch.bitwise_left_shift(codes, places).sum(dim=3).to(torch.int32)
    return packed, scale.transpose(1, 2).contiguous(), zero.transpose(1, 2).contiguous()


def codes_int4(packed: Tensor) -> Tensor:
    """The codes of all rows, including the padding of the last tile: (16 T, K) int32."""
    T, blocks, _ = packed.shape
    places = torch.arange(0, 32, 4, device=packed.device, dtype=packed.dtype)
    codes = torch.bitwise_right_shift(packed.unsqueeze(3), places) & 15
    return codes.transpose(1, 2).reshape(T * TILE, blocks * 8).to(torch.int32)


def untile(t: Tensor) -> Tensor:
    """Scales, zeros or packed codes of all rows: (T, K / G, 16) -> (16 T, K / G)."""
    rows: Tensor = t.transpose(1, 2).flatten(0, 1)
    return rows


def rows_int4(t: Tensor, start: int, stop: int) -> Tensor:
    """Codes, scales or zeros of rows `start`:`stop`, tiled; a view if these are whole tiles."""
    first = start // TILE
    t = t[first : -(-stop // TILE)]
    if start % TILE == stop % TILE == 0:
        return t
    rows = untile(t)[start - first * TILE : stop - first * TILE]
    tiles = F.pad(rows, (0, 0, 0, -len(rows) % TILE)).unflatten(0, (-1, TILE))
    retiled: Tensor = tiles.transpose(1, 2).contiguous()
    return retiled


def dequantize_int4(packed: Tensor, scale: Tensor, zero: Tensor, n: int) -> Tensor:
    """The first n rows: (n, K) fp32."""
    codes = codes_int4(packed).unflatten(1, (scale.shape[1], -1))
    w: Tensor = codes * untile(scale).float().unsqueeze(2) + untile(zero).float().unsqueeze(2)
    return w.flatten(1)[:n]


def scales_and_zeros_int4(scale: Tensor, zero: Tensor) -> Tensor:
    """Scales and zeros of a `quantize_int4` weight in the layout of torch's own int4 matmuls.

    torch defines a weight as (code - 8) * scale + zero, so its zero differs and is rounded again.

    Returns:
        (K / G, 16 T, 2) bf16.
    """
    return scales_and_zeros(untile(scale), untile(zero))


def scales_and_zeros(scale: Tensor, zero: Tensor) -> Tensor:
    """The same for scales and zeros (N, K / G) of weights that are code * scale + zero."""
    middle = zero.float() + 8 * scale.float()
    both = torch.stack((scale.bfloat16(), middle.bfloat16()), dim=2).transpose(0, 1)
    return both.clone(memory_format=torch.contiguous_format)


def linear_int4(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, n: int) -> Tensor:
    """x (..., K) times the transpose of a `quantize_int4` weight of n rows: (..., n)."""
    if kernels.is_fastest("int4", x):
        y: Tensor = torch.ops.llama3.linear_int4(x, packed, scale, zero, n)
        return y
    if (wide := _fp16_to_fp32(x)) is not x:
        return linear_int4(wide, packed, scale, zero, n).to(x.dtype)
    weights = (unpack_int4(x, *block) for block in blocks_int4(packed, scale, zero, n))
    return torch.cat([F.linear(x, w) for w in weights], dim=-1)


def blocks_int4(
    packed: Tensor, scale: Tensor, zero: Tensor, n: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Blocks of rows of a `quantize_int4` weight of n rows: codes, scales, zeros and rows."""
    rows = [BLOCK] * (n // BLOCK) + [n % BLOCK] * (n % BLOCK > 0)
    parts = (t.split(BLOCK // TILE) for t in (packed, scale, zero))
    return zip(*parts, rows, strict=True)


def unpack_int4(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, n: int) -> Tensor:
    """`dequantize_int4` in x's dtype."""
    if kernels.supports(x):
        w: Tensor = torch.ops.llama3.unpack_int4(x, packed, scale, zero, n)
        return w
    return dequantize_int4(packed, scale, zero, n).to(x.dtype)
