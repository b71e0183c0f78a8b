"""Activations in 8 bits, and the integer products with them, against a few lines of torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.layers.quantization import linear_int8, quantize_int8

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


def activation_error(x: Tensor, w: Tensor) -> Tensor:
    """The most that x in 8 bits changes x w^T: half a scale for each weight, (M, N) fp64."""
    half = quantize(x)[1].double().repeat_interleave(BLOCK, dim=1)[:, : x.shape[1]] * 0.50001
    return half.clamp(min=SMALLEST) @ w.double().abs().T


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


@pytest.fixture(params=["avx512-vnni", "avx2-vnni"])
def vnni(request: pytest.FixtureRequest, ops: object) -> Iterator[None]:
    """The integer products of one width of vectors."""
    if request.param not in torch.ops.llama3.variants():
        pytest.skip(f"this processor has no {request.param}")
    torch.ops.llama3.use_variant(request.param)
    yield
    torch.ops.llama3.use_variant("")


def product(x: Tensor, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x in 8 bits times an int8 weight in fp64, (M, N); and how far fp32 sums may be from it."""
    codes, scales, _ = quantize(x)
    blocks = F.pad(q.double(), (0, -q.shape[1] % 64)).unflatten(1, (-1, BLOCK))
    sums = torch.einsum("mbk,nbk->mnb", codes, blocks) * scales.double()[:, None]
    error = sums.abs().sum(dim=2) * scale.double() * (2 + sums.shape[2]) * 2**-24
    return sums.sum(dim=2) * scale.double(), error


def weights(N: int, K: int) -> tuple[Tensor, Tensor]:
    """Any codes, also -128, and scales."""
    generator = torch.Generator().manual_seed(N * K)
    q = torch.randint(-128, 128, (N, K), dtype=torch.int8, generator=generator)
    return q, torch.rand(N, generator=generator) + 0.01


def check(y: Tensor, x: Tensor, q: Tensor, scale: Tensor) -> None:
    exact, error = product(x, q, scale)
    rounding = torch.finfo(x.dtype).eps / 2 * exact.abs() + torch.finfo(x.dtype).tiny
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= error + rounding).all())


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
# Fewer columns than a block, remainders of blocks and of cache lines, several parts of a tile.
COLUMNS = [1, 31, 32, 33, 64, 96, 576, 1000, 1024, 2112]


@DTYPES
@pytest.mark.parametrize("K", COLUMNS)
def test_products_of_all_numbers_of_rows(vnni: None, dtype: torch.dtype, K: int) -> None:
    """Also: the outputs of a row are the same bits beside any number of other rows."""
    x = rows_of("usual", 50, K).to(dtype)
    for N in (1, 15, 16, 33, 130):
        q, scale = weights(N, K)
        whole = torch.ops.llama3.linear_int8(x, q, scale)
        check(whole, x, q, scale)
        for M in (*range(1, 15), 24, 25, 37):
            y = torch.ops.llama3.linear_int8(x[50 - M :], q, scale)
            assert torch.equal(y, whole[50 - M :]), (M, N)


@DTYPES
@pytest.mark.parametrize("M", [1, 3, 14, 40])
def test_values_that_are_not_finite_huge_tiny_or_zero(
    vnni: None, dtype: torch.dtype, M: int
) -> None:
    q, scale = weights(21, 100)
    x = rows_of("usual", M, 100).to(dtype)
    usual = torch.ops.llama3.linear_int8(x, q, scale)
    for value in (float("inf"), float("-inf"), float("nan")):
        for row, column in ((0, 0), (M - 1, 99), (M // 2, 40)):
            bad = x.clone()
            bad[row, column] = value
            y = torch.ops.llama3.linear_int8(bad, q, scale)
            assert y[row].isnan().all()
            assert torch.equal(y[torch.arange(M) != row], usual[torch.arange(M) != row])
    for kind in ("tiny", "zero"):
        x = rows_of(kind, M, 100).to(dtype)
        check(torch.ops.llama3.linear_int8(x, q, scale), x, q, scale)
    # As long as the sum of |x q| is not above fp32's range, no intermediate result is.
    x = (rows_of("usual", M, 100).sign() * 2e34).to(dtype)
    check(torch.ops.llama3.linear_int8(x, q, scale), x, q, scale)


@DTYPES
def test_beside_the_product_that_is_not_quantized(vnni: None, dtype: torch.dtype) -> None:
    for M, N, K in [(1, 576, 576), (3, 17, 1536), (20, 40, 333)]:
        x = rows_of("usual", M, K).to(dtype)
        w = torch.randn(N, K, generator=torch.Generator().manual_seed(K)) * 0.05
        q, scale = quantize_int8(w)
        w = q.double() * scale.double()[:, None]
        exact = x.double() @ w.T
        difference = torch.ops.llama3.linear_int8(x, q, scale).double() - exact
        rounding = torch.finfo(dtype).eps * exact.abs() + 1e-4
        assert bool((difference.abs() <= activation_error(x, w) + rounding).all())
        # Errors are independent, so they are far from adding up.
        assert difference.norm() < 0.01 * exact.norm()


def test_threads_split_tiles_anywhere(vnni: None) -> None:
    threads = torch.get_num_threads()
    q, scale = weights(16 * 37 + 5, 640)
    try:
        for M in (1, 6, 30):
            x, results = rows_of("usual", M, 640), []
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                results.append(torch.ops.llama3.linear_int8(x, q, scale))
            assert all(torch.equal(y, results[0]) for y in results)
    finally:
        torch.set_num_threads(threads)


def test_empty_inputs_views_and_wrong_shapes(vnni: None) -> None:
    linear, (q, scale) = torch.ops.llama3.linear_int8, weights(6, 40)
    assert linear(torch.empty(0, 40), q, scale).shape == (0, 6)
    assert linear(torch.empty(2, 40), q[:0], scale[:0]).shape == (2, 0)
    for M in (2, 40):  # also of many rows
        assert not linear(torch.empty(M, 0), q[:, :0].contiguous(), scale).any()
    x = torch.randn(40, 3, 2).transpose(0, 2)  # (2, 3, 40), not contiguous
    check(linear(x, q, scale).flatten(0, 1), x.flatten(0, 1), q, scale)
    odd = torch.randn(81)[1:].view(2, 40)  # not aligned
    check(
        linear(odd, torch.cat([q, q]).flatten()[1:241].view(6, 40), scale),
        odd,
        torch.cat([q, q]).flatten()[1:241].view(6, 40),
        scale,
    )
    for bad in ((x[..., :39], q, scale), (x, q, scale[:5]), (x, q.T, scale), (x, q.int(), scale)):
        with pytest.raises(RuntimeError, match="must be"):
            linear(*bad)


def test_integer_products_can_be_switched_off(ops: object) -> None:
    """`use_variant` of a name without -vnni; they are on wherever the processor has them."""
    names = torch.ops.llama3.variants()
    exact = [name for name in names if not name.endswith("-vnni")]
    assert "plain" in exact and all(name.removesuffix("-vnni") in exact for name in names)
    q, scale = weights(16, 64)
    x = rows_of("usual", 1, 64)
    torch.ops.llama3.use_variant(exact[0])
    y = torch.ops.llama3.linear_int8(x, q, scale)
    torch.testing.assert_close(y, (x.double() @ (q.double() * scale[:, None]).T).float())
    torch.ops.llama3.use_variant("")
    same = torch.equal(torch.ops.llama3.linear_int8(x, q, scale), y)
    assert same == (names[0] == exact[0])
    if not same:
        check(linear_int8(x.expand(70, -1), q, scale), x.expand(70, -1), q, scale)
    with pytest.raises(RuntimeError, match="no variant plain-vnni"):
        torch.ops.llama3.use_variant("plain-vnni")
