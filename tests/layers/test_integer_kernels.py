"""Activations in 8 bits, and the integer products with them, against a few lines of torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32
SMALLEST = 2.0**-119  # blocks below count as zero


@pytest.fixture
def integer_ops(ops: object) -> None:
    if "avx2" not in torch.ops.llama3.variants():
        pytest.skip("this processor has no AVX2")


def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(M, K) -> codes (M, B, 32) fp64, scales (M, B) fp32, sums (M, B), B even."""
    blocks = F.pad(x.float(), (0, -x.shape[1] % 64)).unflatten(1, (-1, BLOCK))
    largest = blocks.abs().amax(dim=2, keepdim=True)
    finite = blocks.isfinite().all(dim=2, keepdim=True)
    used = finite & (largest >= SMALLEST)
    inverse = torch.full_like(largest, 127) / largest.where(used, 1)
    codes = (blocks.where(used, 0) * inverse).round().double()
    scales = (largest / torch.full_like(largest, 127)).where(used, 0)
    return codes, scales.where(finite, torch.nan)[..., 0], codes.sum(dim=2)


def rows_of(kind: str, M: int, K: int) -> Tensor:
    """Activations of a kind; blocks differ in size."""
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(M * K))
    sizes = torch.arange(K).div(BLOCK, rounding_mode="floor").add(1)
    factor = {"usual": sizes, "tiny": sizes * 1e-37, "huge": sizes * 1e37, "zero": 0 * sizes}[kind]
    return (x * factor).clamp(-3.3e38, 3.3e38)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["usual", "tiny", "huge", "zero"])
def test_quantized_rows(integer_ops: None, dtype: torch.dtype, kind: str) -> None:
    for M, K in [(1, 1), (3, 31), (2, 32), (2, 33), (5, 64), (4, 576), (1, 1000), (0, 40), (3, 0)]:
        x = rows_of(kind, M, K).to(dtype)
        codes, scales, sums = torch.ops.llama3.quantize_rows(x)
        assert codes.shape == (M, -(-K // 64) * 64) and codes.dtype == torch.int8
        want = quantize(x)
        assert torch.equal(codes.double().unflatten(1, (-1, BLOCK)), want[0])
        assert torch.equal(scales, want[1]) and torch.equal(sums.double(), want[2])
        back = (want[0] * want[1].double()[..., None]).flatten(1)[:, :K]
        half = want[1].double().repeat_interleave(BLOCK, dim=1)[:, :K] * 0.50001
        assert bool(((back - x.double()).abs() <= half.clamp(min=SMALLEST)).all())


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_block_that_is_not_finite(integer_ops: None, value: float) -> None:
    x = rows_of("usual", 2, 100)
    x[1, 40] = value
    codes, scales, sums = torch.ops.llama3.quantize_rows(x)
    assert scales.isnan().tolist() == [[False] * 4, [False, True, False, False]]
    assert not codes[1, 32:64].any() and sums[1, 1] == 0
    assert torch.equal(codes.double().unflatten(1, (-1, BLOCK)), quantize(x)[0])


def test_ties_are_rounded_to_even(integer_ops: None) -> None:
    x = torch.arange(32.0)[None] * 0.5
    x[0, 31] = 127
    codes = torch.ops.llama3.quantize_rows(x)[0][0, :32]
    assert codes.tolist() == [*(2 * ((i + 2) // 4) if i % 2 else i // 2 for i in range(31)), 127]


def test_wrong_rows_are_named(integer_ops: None) -> None:
    for x, message in [
        (torch.randn(8), r"x must be \(M, K\)"),
        (torch.randn(2, 8).half(), "x must be fp32 or bf16"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.llama3.quantize_rows(x)
