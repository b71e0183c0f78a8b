"""Weights in blocks of 4 and 6 bits: the bytes by plain arithmetic, the grids, the CPU kernels."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from llama.layers import kernels
from llama.layers.block_products import linear_blocks, unpack_blocks
from llama.layers.blocks import (
    dequantize_blocks,
    find_grid,
    nearest_codes,
    pack,
    quantize_blocks,
    row_blocks,
    unpack,
)
from llama.layers.quantized_linear import BlockLinear
from llama.layers.schemes import block_bytes, block_columns, block_layout

needs_kernels = pytest.mark.skipif(not kernels.load(), reason="no CPU kernels here")
BITS = pytest.mark.parametrize("bits", [4, 6])


@pytest.fixture(params=torch.ops.llama3.variants() if kernels.load() else [])
def variant(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.ops.llama3.use_variant(request.param)
    yield request.param
    torch.ops.llama3.use_variant("")


def plain_weight(block: bytes, bits: int, groups: int, row: int, column: int) -> float:
    """A weight of a block, as the docstring of blocks.py says."""
    g, c = column // 32, column % 32

    def number(at: int) -> float:  # the upper half of an fp32
        found: float = struct.unpack("<f", b"\0\0" + block[at : at + 2])[0]
        return found

    low = block[64 + 16 * g + row]
    high = block[64 + 16 * groups + g // 2 * 16 + row] >> 4 * (g % 2)
    steps, zero_steps = (low & 15) + 16 * (high & 3), (low >> 4) + 16 * (high >> 2 & 3)
    nibbles = 64 + 16 * groups + 16 * ((groups + 1) // 2)
    byte = block[nibbles + 256 * g + 64 * (c // 8) + 4 * row + c % 4]
    code = byte >> 4 if c % 8 >= 4 else byte & 15
    if bits == 6:
        byte = block[nibbles + 256 * groups + 128 * g + 64 * (c // 16) + 4 * row + c % 4]
        code += 16 * (byte >> 2 * (c // 4 % 4) & 3)
    return code * (number(2 * row) * steps) - number(32 + 2 * row) * zero_steps


@BITS
@pytest.mark.parametrize("K", [32, 96, 576, 512])
def test_bytes_by_plain_arithmetic(bits: int, K: int) -> None:
    w = torch.randn(21, K)  # the second tile is not full
    blocks, columns = quantize_blocks(w, bits), block_columns(K)
    assert blocks.shape == (2, K // columns, block_bytes(bits, columns))
    assert block_layout(blocks.shape[2]) == (bits, columns)
    found = dequantize_blocks(blocks, 21)
    for row in (0, 7, 15, 16, 20):
        for column in range(0, K, 5):
            block = bytes(blocks[row // 16, column // columns].tolist())
            place = bits, columns // 32, row % 16, column % columns
            # Products are rounded to fp32.
            assert plain_weight(block, *place) == pytest.approx(
                found[row, column].item(), rel=1e-6, abs=1e-7
            )
    assert not dequantize_blocks(blocks, 32)[21:].any()
    grid, codes = unpack(blocks)
    assert torch.equal(pack(grid, codes, bits), blocks)


def test_a_block_of_256_columns_has_four_and_a_half_bits() -> None:
    assert block_bytes(4, 256) * 8 == 4.5 * 16 * 256
    assert block_bytes(6, 256) * 8 == 6.5 * 16 * 256
    assert [block_columns(K) for K in (32, 576, 1536, 2048, 8192, 14336)] == [
        32, 192, 256, 256, 256, 256,
    ]  # fmt: skip


@BITS
def test_the_grid_is_better_than_the_largest_and_smallest_weights(bits: int) -> None:
    w = torch.randn(64, 512)
    groups = w.unflatten(1, (-1, 32))
    low = groups.amin(2, keepdim=True)
    scale = (groups.amax(2, keepdim=True) - low) / (2**bits - 1)
    simple = ((groups - low) / scale).round() * scale + low
    error = (dequantize_blocks(quantize_blocks(w, bits), 64) - w).square().sum()
    assert error < 0.95 * (simple - groups).square().sum()  # although scales have 6 bits
    importance = torch.ones(512)
    importance[::8] = 100
    blocks = quantize_blocks(w, bits, importance)
    assert ((dequantize_blocks(blocks, 64) - w)[:, ::8].square().sum()) < 0.8 * error / 8


@BITS
def test_odd_weights(bits: int) -> None:
    """Zeros, equal weights, one sign, one large weight, and huge and tiny ones."""
    w = torch.randn(16, 64)
    w[0], w[1], w[2], w[3], w[4] = 0, 0.3, w[2].abs(), -w[3].abs(), w[4] * 1e30
    w[5], w[6, 1:], w[7] = w[5] * 1e-30, w[6, 1:] * 1e-4, -0.7
    found = dequantize_blocks(quantize_blocks(w, bits), 16)
    assert not found[0].any()
    step = (w.amax(1).clamp(min=0) - w.amin(1).clamp(max=0)) / (2**bits - 1)
    assert ((found - w).abs() <= 1.1 * step.unsqueeze(1)).all()
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = w.clone()
        bad[9, 40] = value
        assert not dequantize_blocks(quantize_blocks(bad, bits), 16)[9].isfinite().any()


@BITS
def test_rows_and_columns_of_blocks(bits: int) -> None:
    """Parts of a weight have the codes of the whole."""
    w = torch.randn(40, 512)
    blocks = quantize_blocks(w, bits)
    whole = dequantize_blocks(blocks, 40)
    for start, stop in ((0, 16), (8, 24), (5, 40), (16, 40)):
        part = row_blocks(blocks, start, stop)
        assert torch.equal(dequantize_blocks(part, stop - start), whole[start:stop])
    assert row_blocks(blocks, 16, 32).data_ptr() == blocks[1].data_ptr()
    assert torch.equal(quantize_blocks(w[:, 256:], bits), blocks[:, 1:])
    assert torch.equal(quantize_blocks(w[16:32], bits), blocks[1:2])
    meta = quantize_blocks(w.to("meta"), bits)
    assert (meta.shape, meta.dtype) == (blocks.shape, torch.uint8)


def test_weights_that_have_no_groups() -> None:
    with pytest.raises(ValueError, match="groups of 32 do not divide 48 columns; use int8"):
        quantize_blocks(torch.randn(4, 48), 4)
    with pytest.raises(ValueError, match="no block has 100 bytes"):
        unpack(torch.zeros(1, 1, 100, dtype=torch.uint8))


def in_8_bits(x: Tensor) -> Tensor:
    """x as the integer products read it: blocks of 32 with a scale each."""
    groups = x.float().unflatten(-1, (-1, 32))
    most = groups.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(most, 127) / most  # 127 / most would round twice
    rounded: Tensor = ((groups * inverse).round() * (most / 127)).flatten(-2)
    return rounded


@needs_kernels
@BITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels(variant: str, bits: int, dtype: torch.dtype) -> None:
    for N, K in ((16, 32), (37, 96), (5, 576)):
        blocks = quantize_blocks(torch.randn(N, K), bits)
        w = dequantize_blocks(blocks, N)
        assert torch.equal(
            torch.ops.llama3.unpack_blocks(torch.ones(1, dtype=dtype), blocks, N), w.to(dtype)
        )
        x = torch.randn(11, K).to(dtype)
        together = torch.ops.llama3.linear_blocks(x, blocks, N)
        assert together.dtype == dtype and together.shape == (11, N)
        read = in_8_bits(x) if variant.endswith("-vnni") else x.float()
        want = read.double() @ w.double().T
        bound = read.double().abs() @ w.double().abs().T
        rounding = 2.0**-8 * want.abs() if dtype == torch.bfloat16 else 0
        assert ((together - want).abs() <= rounding + 2.0**-20 * bound).all()
        for rows in (1, 2, 3, 5, 8):  # the rows beside one do not matter
            part = torch.ops.llama3.linear_blocks(x[:rows], blocks, N)
            if variant.endswith("-vnni"):
                assert torch.equal(part, together[:rows])
            else:
                torch.testing.assert_close(part, together[:rows])


@needs_kernels
@BITS
def test_nan_and_infinity_are_not_hidden(variant: str, bits: int) -> None:
    blocks = quantize_blocks(torch.randn(20, 96), bits)
    for value in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(3, 96)
        x[1, 40] = value
        y = torch.ops.llama3.linear_blocks(x, blocks, 20)
        assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


@needs_kernels
def test_wrong_arguments() -> None:
    blocks, x = quantize_blocks(torch.randn(20, 96), 4), torch.randn(2, 96)
    multiply, widen = torch.ops.llama3.linear_blocks, torch.ops.llama3.unpack_blocks
    calls: list[Callable[[], object]] = [
        lambda: multiply(x[:, :64], blocks, 20),
        lambda: multiply(x.double(), blocks, 20),
        lambda: multiply(x, blocks, 40),
        lambda: multiply(x, blocks, 0),
        lambda: multiply(x, blocks[:, :, :100].contiguous(), 20),
        lambda: multiply(x, blocks[:, :, ::2], 20),
        lambda: multiply(x, blocks.to(torch.int8), 20),
        lambda: widen(x, blocks[:, :0], 20),
    ]
    for wrong in calls:
        with pytest.raises(RuntimeError):
            wrong()
    assert multiply(x[:0], blocks, 20).shape == (0, 20)
    assert multiply(torch.empty(2, 3, 96), blocks, 20).shape == (2, 3, 20)
    with torch.device("meta"):
        assert multiply(torch.empty(2, 96), blocks.to("meta"), 20).shape == (2, 20)
        assert widen(torch.empty(2), blocks.to("meta"), 20).shape == (20, 96)


@BITS
def test_the_linear(bits: int) -> None:
    """`.to` keeps the bytes; without kernels, in float16 and for gradients, the same numbers."""
    w = torch.randn(37, 192)
    linear = BlockLinear(w, bits)
    plain = dequantize_blocks(linear.blocks, 37)
    before = linear.blocks.clone()
    linear.to(torch.float16)
    assert torch.equal(linear.blocks, before)
    assert (linear.out_features, linear.in_features, linear.bits) == (37, 192, bits)
    assert torch.equal(torch.cat(list(linear.row_parts())), plain)
    x = torch.randn(2, 3, 192)
    exact = x @ plain.T
    for y in (linear(x), linear(x.half()).float()):
        assert (y - exact).norm() < 0.02 * exact.norm()
    x.requires_grad_()
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, plain.sum(0).expand(2, 3, 192))
    wide = x.detach().double()  # no kernel has this dtype
    torch.testing.assert_close(linear_blocks(wide, linear.blocks, 37), wide @ plain.double().T)
    assert torch.equal(unpack_blocks(wide, linear.blocks, 37), plain.double())


def test_codes_are_of_the_rounded_grid() -> None:
    w = torch.randn(16, 64)
    grid = find_grid(w, 4)
    codes = nearest_codes(w, grid, 4)
    scale, zero = (t.repeat_interleave(32, 1) for t in (grid.scale(), grid.zero()))
    for other in (codes.int() - 1, codes.int() + 1):
        other = other.clamp(0, 15)
        there = (codes * scale - zero - w).abs()
        assert (there <= (other * scale - zero - w).abs() + 1e-6).all()
    assert grid.unit.dtype == torch.bfloat16 and grid.steps.max() <= 63
