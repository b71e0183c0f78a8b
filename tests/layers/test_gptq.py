"""gptq.py: codes of a slow implementation, and what the compensation gains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llama.layers.blocks import dequantize_blocks, quantize_blocks, unpack
from llama.layers.gptq import compensated_blocks, inverse_factor


def correlated(columns: int, rows: int = 1000) -> Tensor:
    """Inputs (rows, columns) with large correlations and different sizes."""
    shared = torch.randn(rows, columns // 4) @ torch.randn(columns // 4, columns)
    return (shared + torch.randn(rows, columns)) * torch.rand(columns)


def error(blocks: Tensor, w: Tensor, x: Tensor) -> float:
    """Of the outputs for inputs x."""
    return float((x @ (dequantize_blocks(blocks, len(w)) - w).T).square().sum())


def test_codes_of_a_slow_implementation() -> None:
    """Column by column in fp64, eliminating each from the inverse (arXiv:2208.11580, eq. 3).

    The grids are those that were chosen; 288 columns are three blocks of 96.
    """
    x, w = correlated(288), torch.randn(20, 288)
    H = x.T @ x
    grid, codes = unpack(compensated_blocks(w, inverse_factor(H), 4))
    scale, zero = grid.scale().double(), grid.zero().double()
    left, inverse = w.double(), H.double()
    inverse = torch.linalg.inv(inverse + 0.01 * inverse.diagonal().mean() * torch.eye(288))
    different = 0
    for i in range(288):
        s, z = scale[:20, i // 32], zero[:20, i // 32]
        code = ((left[:, i] + z) / s).round().clamp(0, 15)
        different += int((code != codes[:20, i]).sum())
        error = (left[:, i] - (code * s - z)) / inverse[i, i]
        left -= error.outer(inverse[i])
        inverse -= inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i].clone()
    assert different <= 0.002 * codes.numel()  # where fp32 falls on the other side of a half


@pytest.mark.parametrize("bits", [4, 6])
def test_outputs_are_closer_than_of_plain_rounding(bits: int) -> None:
    x, w = correlated(256, 2000), torch.randn(48, 256)
    seen, unseen = x[:1000], x[1000:]
    blocks = compensated_blocks(w, inverse_factor(seen.T @ seen), bits)
    plain = quantize_blocks(w, bits)
    assert blocks.shape == plain.shape and blocks.dtype == plain.dtype
    assert error(blocks, w, seen) < 0.3 * error(plain, w, seen)
    assert error(blocks, w, unseen) < 0.4 * error(plain, w, unseen)


@pytest.mark.parametrize("moments", [torch.zeros(512, 512), 7 * torch.eye(512)])
def test_uncorrelated_inputs_are_plain_rounding(moments: Tensor) -> None:
    """Also where there are no inputs at all."""
    w = torch.randn(16, 512)
    assert torch.equal(compensated_blocks(w, inverse_factor(moments), 4), quantize_blocks(w, 4))


def test_singular_moments() -> None:
    """One input vector with zeros, whose weights stay near their values."""
    x, w = torch.randn(1, 64), torch.randn(16, 64)
    x[:, 5:40] = 0
    blocks = compensated_blocks(w, inverse_factor(x.T @ x), 4)
    assert error(blocks, w, x) < 0.1 * error(quantize_blocks(w, 4), w, x)
    step = (w.amax() - w.amin()) / 15
    assert (dequantize_blocks(blocks, 16) - w)[:, 5:32].abs().max() < step


def test_equal_weights() -> None:
    """Scales of zero."""
    w, x = torch.zeros(16, 64), correlated(64)
    w[3] = 0.25
    rounded = dequantize_blocks(compensated_blocks(w, inverse_factor(x.T @ x), 4), 16)
    torch.testing.assert_close(rounded, w, atol=1e-3, rtol=0)
