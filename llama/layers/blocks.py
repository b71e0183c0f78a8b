"""Weights of 4 and 6 bits in blocks: matrix -> bytes, and back. Knows nothing about models.

Rows have groups of 32 columns, and up to 8 neighbouring groups share two 16-bit numbers, `unit` and
`zero_unit`, which are multiplied by integers of 6 bits for each group:

    weight = code * scale - zero,  scale = unit * steps,  zero = zero_unit * zero_steps

A block is 16 rows by G groups. Its bytes lie together, in the order in which the CPU kernels read
them; r is a row of the block, g a group, code[c] that of column c of a group:

    units       (16,) bf16
    zero_units  (16,) bf16
    low         (G, 16)        steps & 15, and zero_steps & 15 in the upper half of the byte
    high        (G / 2, 16)    2 bits each: steps >> 4, zero_steps >> 4, of group 2i and of 2i + 1
    nibbles     (G, 4, 16, 4)  [g, v, r, j]: code[8v + j] & 15, above it code[8v + 4 + j] & 15
    top         (G, 2, 16, 4)  only of 6 bits: code[16v + 4i + j] >> 4 in bits 2i and 2i + 1

Shapes: N rows (outputs) and K columns of a weight, T tiles of 16 rows, B blocks of a tile, Q groups
of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.layers.schemes import BLOCK_GROUP, TILE, block_bytes, block_columns, block_layout

MOST_STEPS = 63
# Ranges of codes that are tried for a group: its largest weight may be cut off, or not be reached.
RANGES = (0.0, -1.0, -0.7, -0.4, -0.1, 0.25)
UNITS = 32  # that are tried for a block


@dataclass(frozen=True)
class Grid:
    """The numbers that the codes of a weight stand for, as they are stored.

    Attributes:
        unit, zero_unit: (N, B) bf16.
        steps, zero_steps: (N, Q) uint8, 0 to 63.
    """

    unit: Tensor
    zero_unit: Tensor
    steps: Tensor
    zero_steps: Tensor

    def scale(self) -> Tensor:
        """(N, Q) fp32."""
        return _times(self.steps, self.unit)

    def zero(self) -> Tensor:
        """(N, Q) fp32, not negative."""
        return _times(self.zero_steps, self.zero_unit)


def _times(steps: Tensor, unit: Tensor) -> Tensor:
    by_block = steps.unflatten(1, (unit.shape[1], -1)).float()
    product: Tensor = by_block * unit.float().unsqueeze(2)
    return product.flatten(1)


def quantize_blocks(w: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Codes and their grid: (N, K) -> (T, B, bytes of a block) uint8. See `find_grid`."""
    if w.is_meta:  # nothing is computed there: it would import torch._dynamo
        T, columns = -(-len(w) // TILE), block_columns(w.shape[1])
        shape = T, w.shape[1] // columns, block_bytes(bits, columns)
        return torch.empty(shape, dtype=torch.uint8, device=w.device)
    w = F.pad(w.float(), (0, 0, 0, -len(w) % TILE))
    grid = find_grid(w, bits, importance)
    return pack(grid, nearest_codes(w, grid, bits), bits)


def find_grid(w: Tensor, bits: int, importance: Tensor | None = None) -> Grid:
    """The grid that makes the squared error of the rounded weights w (N, K) small.

    Args:
        importance: (K,), positive: the cost of a squared error of each column; None: equal.

    Raises:
        ValueError: 32 does not divide K.
    """
    columns = block_columns(w.shape[1])
    groups = _by_group(w.float())
    p = None if importance is None else _by_group(importance.float().unsqueeze(0))
    top = 2**bits - 1
    scale, zero = _fit(groups, p, top)
    unit, zero_unit = (_unit(t, columns // BLOCK_GROUP) for t in (scale, zero))
    each = [t.float().repeat_interleave(columns // BLOCK_GROUP, dim=1) for t in (unit, zero_unit)]
    steps, zero_steps = _steps(groups, p, top, (scale, zero, *each))
    return Grid(unit, zero_unit, steps.to(torch.uint8), zero_steps.to(torch.uint8))


def refit_group(grid: Grid, g: int, w: Tensor, bits: int, importance: Tensor) -> None:
    """Change group g of a block's grid to fit the weights w (N, 32), with the units as they are.

    Args:
        importance: (32,), see `find_grid`.
    """
    groups, p = _by_group(w), _by_group(importance.unsqueeze(0))
    top = 2**bits - 1
    units = grid.unit.float(), grid.zero_unit.float()
    steps, zero_steps = _steps(groups, p, top, (*_fit(groups, p, top), *units))
    grid.steps[:, g] = steps[:, 0]
    grid.zero_steps[:, g] = zero_steps[:, 0]


def _by_group(w: Tensor) -> Tensor:
    """(N, K) -> (32, N, Q): sums over a group are sums of whole matrices."""
    groups: Tensor = w.unflatten(1, (-1, BLOCK_GROUP)).permute(2, 0, 1).contiguous()
    return groups


def _total(x: Tensor, p: Tensor | None = None) -> Tensor:
    """The sum of each group, (N, Q), added in one order on every device."""
    x = x if p is None else x * p
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def _round(groups: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    return groups.add(zero).div_(scale).round_().clamp_(0, top)


def _fit(groups: Tensor, p: Tensor | None, top: int) -> tuple[Tensor, Tensor]:
    """Scales and zeros (N, Q) with a small squared error: for each of several ranges, the codes
    are rounded and the scale and zero of least squares for these codes are computed.
    """
    depth, high = 0 - groups.amin(0).clamp(max=0), groups.amax(0).clamp(min=0)
    count = _total(torch.ones_like(groups[:, :1]), p)
    total = _total(groups, p)
    best: tuple[Tensor, ...] = ()
    for change in RANGES:
        first = _no_zeros((high + depth) / _number(top + change, high))
        codes = _round(groups, first, depth, top)
        q, qq, qw = _total(codes, p), _total(codes * codes, p), _total(codes * groups, p)
        determinant = count * qq - q * q
        scale = (count * qw - q * total) / _no_zeros(determinant)
        zero = (q * qw - qq * total) / _no_zeros(determinant)
        # No negative zeros can be stored: then the best scale without one.
        scale = scale.where(zero >= 0, qw / _no_zeros(qq))
        zero = zero.clamp(min=0)
        solved = (determinant > 0) & (scale > 0)
        scale, zero = scale.where(solved, first), zero.where(solved, depth)
        error = scale * (scale * qq - 2 * (zero * q + qw)) + zero * (zero * count + 2 * total)
        best = _better(best, (error, scale, zero))
    _, scale, zero = best
    return scale, zero


def _better(best: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of two choices, each its errors and what caused them, the better one for each element."""
    if not best:
        return found
    smaller = found[0] < best[0]
    return tuple(new.where(smaller, old) for new, old in zip(found, best, strict=True))


def _number(value: float, like: Tensor) -> Tensor:
    """A GPU multiplies by the inverse of a Python number, which rounds otherwise."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _no_zeros(x: Tensor) -> Tensor:
    return x.where(x != 0, 1)


def _unit(values: Tensor, groups: int) -> Tensor:
    """(N, Q) -> (N, B) bf16: the unit of which the values of a block are nearly multiples."""
    blocks = values.unflatten(1, (-1, groups))
    largest = blocks.amax(2, keepdim=True)
    best: tuple[Tensor, ...] = ()
    for i in range(UNITS):
        unit = (largest / _number(MOST_STEPS - i, values)).bfloat16()
        step = _no_zeros(unit.float())
        error = (blocks / step).round().clamp(max=MOST_STEPS).mul(step).sub(blocks).square().sum(2)
        best = _better(best, (error, unit.squeeze(2)))
    return best[1]


def _steps(
    groups: Tensor, p: Tensor | None, top: int, fitted: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Integers of the scales and zeros: of the two next to each, those with the smaller error.

    Args:
        fitted: scales, zeros, and the units of both for each group, all (N, Q) fp32.
    """
    scale, zero = fitted[:2]
    unit, zero_unit = (_no_zeros(t) for t in fitted[2:])
    count, total = _total(torch.ones_like(groups[:, :1]), p), _total(groups, p)
    best: tuple[Tensor, ...] = ()
    for more in (0, 1):
        steps = ((scale / unit).floor() + more).clamp(0, MOST_STEPS)
        rounded = _no_zeros(steps * unit)
        codes = _total(_round(groups, rounded, zero, top), p)
        middle = (steps * unit * codes - total) / count  # the best zero for these codes
        for more_zero in (0, 1):
            zero_steps = ((middle / zero_unit).floor() + more_zero).clamp(0, MOST_STEPS)
            offset = zero_steps * zero_unit
            error = _round(groups, rounded, offset, top).mul_(steps * unit)
            error = _total(error.sub_(offset).sub_(groups).square_(), p)
            best = _better(best, (error, steps, zero_steps))
    _, steps, zero_steps = best
    return steps, zero_steps


def nearest_codes(w: Tensor, grid: Grid, bits: int) -> Tensor:
    """(N, K) uint8: the codes of weights w (N, K)."""
    groups = w.float().unflatten(1, (-1, BLOCK_GROUP))
    scale, zero = _no_zeros(grid.scale()).unsqueeze(2), grid.zero().unsqueeze(2)
    return _round(groups, scale, zero, 2**bits - 1).to(torch.uint8).flatten(1)


def pack(grid: Grid, codes: Tensor, bits: int) -> Tensor:
    """(N, K) codes -> (T, B, bytes of a block) uint8; 16 divides N."""
    T, B = len(codes) // TILE, grid.unit.shape[1]
    units = [t.view(torch.uint8).view(T, TILE, B, 2) for t in (grid.unit, grid.zero_unit)]
    parts = [t.transpose(1, 2) for t in units]
    both = torch.stack((grid.steps, grid.zero_steps), dim=2).view(T, TILE, B, -1, 2)
    low = both[..., 0] & 15 | (both[..., 1] & 15) << 4
    parts.append(low.permute(0, 2, 3, 1))
    high = both >> 4
    high = F.pad(high[..., 0] | high[..., 1] << 2, (0, both.shape[3] % 2)).unflatten(3, (-1, 2))
    parts.append((high[..., 0] | high[..., 1] << 4).permute(0, 2, 3, 1))
    pairs = (codes & 15).view(T, TILE, B, -1, 4, 2, 4)
    parts.append((pairs[..., 0, :] | pairs[..., 1, :] << 4).permute(0, 2, 3, 4, 1, 5))
    if bits == 6:
        fours = (codes >> 4).view(T, TILE, B, -1, 2, 4, 4)
        top = fours[..., 0, :] | fours[..., 1, :] << 2 | fours[..., 2, :] << 4
        parts.append((top | fours[..., 3, :] << 6).permute(0, 2, 3, 4, 1, 5))
    return torch.cat([part.reshape(T, B, -1) for part in parts], dim=2)


def unpack(blocks: Tensor) -> tuple[Grid, Tensor]:
    """The grid and the codes (16 T, K) uint8 of whole tiles; the inverse of `pack`."""
    T, B, size = blocks.shape
    bits, columns = block_layout(size)
    G = columns // BLOCK_GROUP
    sizes = [32, 32, 16 * G, 16 * -(-G // 2), 256 * G, 128 * G * (bits == 6)]
    units, zero_units, low, high, nibbles, top = blocks.split(sizes, dim=2)
    unit, zero_unit = (
        t.reshape(T, B, TILE, 2).transpose(1, 2).contiguous().view(torch.bfloat16).view(-1, B)
        for t in (units, zero_units)
    )
    low = low.reshape(T, B, G, TILE)
    high = high.reshape(T, B, -1, TILE)
    high = torch.stack((high & 15, high >> 4), dim=3).flatten(2, 3)[:, :, :G]
    steps = low & 15 | (high & 3) << 4, low >> 4 | (high >> 2) << 4
    steps, zero_steps = (t.permute(0, 3, 1, 2).reshape(T * TILE, -1) for t in steps)
    nibbles = nibbles.reshape(T, B, G, 4, TILE, 4)
    codes = torch.stack((nibbles & 15, nibbles >> 4), dim=4)  # (T, B, G, 4, 2, 16, 4)
    codes = codes.permute(0, 5, 1, 2, 3, 4, 6).reshape(T * TILE, -1)
    if bits == 6:
        top = top.reshape(T, B, G, 2, TILE, 4)
        fours = torch.stack([top >> 2 * i & 3 for i in range(4)], dim=4)
        codes = codes | fours.permute(0, 5, 1, 2, 3, 4, 6).reshape(T * TILE, -1) << 4
    return Grid(unit, zero_unit, steps, zero_steps), codes


def dequantize_blocks(blocks: Tensor, n: int) -> Tensor:
    """The first n rows: (n, K) fp32."""
    grid, codes = unpack(blocks)
    groups = codes.unflatten(1, (-1, BLOCK_GROUP)).float()
    w: Tensor = groups.mul_(grid.scale().unsqueeze(2)).sub_(grid.zero().unsqueeze(2))
    return w.flatten(1)[:n]


def row_blocks(blocks: Tensor, start: int, stop: int) -> Tensor:
    """The blocks of rows `start`:`stop`; a view if these are whole tiles."""
    first = start // TILE
    blocks = blocks[first : -(-stop // TILE)]
    if start % TILE == stop % TILE == 0:
        return blocks
    bits, _ = block_layout(blocks.shape[2])
    grid, codes = unpack(blocks)
    rows = slice(start - first * TILE, stop - first * TILE)
    parts = [t[rows] for t in (grid.unit, grid.zero_unit, grid.steps, grid.zero_steps, codes)]
    *parts, codes = (F.pad(t, (0, 0, 0, -len(t) % TILE)) for t in parts)
    return pack(Grid(*parts), codes, bits)


def block_width(blocks: Tensor) -> int:
    """K of a weight in blocks."""
    return blocks.shape[1] * block_layout(blocks.shape[2])[1]
