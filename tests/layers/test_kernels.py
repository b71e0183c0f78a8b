"""The CPU kernels against fp64 arithmetic, for every instruction set of this processor."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llama.layers import kernels
from llama.layers.quantization import (
    dequantize_int4,
    dequantize_int8,
    linear_int4,
    linear_int8,
    quantize_int4,
    quantize_int8,
)


def shapes(seed: int, count: int, multiple: int = 1) -> list[tuple[int, int, int]]:
    """(M, N, K) of every size class, K a multiple of `multiple`."""
    draw = random.Random(seed)
    fixed = [(1, 1, 1), (1, 576, 576), (3, 17, 64), (16, 5, 100), (2, 3, 4097), (7, 1, 63)]
    drawn = [(draw.randint(1, 17), draw.randint(1, 90), draw.randint(1, 700)) for _ in range(count)]
    return [(M, N, -(-K // multiple) * multiple) for M, N, K in fixed + drawn]


# More rows and columns than blocked.h takes at a time, with a remainder in each direction.
LARGE = [(5, 7, 2048), (17, 101, 2081), (13, 197, 4128), (518, 9, 2050), (40, 98, 31)]
# Prompts: more of each than prefill.h takes at a time, K and N of any remainder.
LARGE += [
    (64, 1, 1),
    (65, 25, 513),
    (130, 97, 1030),
    (300, 110, 512),
    (700, 12, 33),
    (81, 205, 575),
]


def inputs(M: int, N: int, K: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(M * N + K)
    x = torch.randn(M, K, generator=generator).to(dtype)
    return x, torch.randn(N, K, generator=generator) * 0.05


def check(y: Tensor, x: Tensor, w: Tensor, terms: Tensor | None = None) -> None:
    """y is x w^T with fp32 sums in any order and one rounding to x's dtype.

    Args:
        terms: the summands of a sum are x times these, if not x times w.
    """
    exact = x.double() @ w.double().T
    # The error of a sum is relative to its summands.
    error = 2e-6 * (x.double().abs() @ (w if terms is None else terms).double().abs().T) + 1e-30
    assert y.dtype == x.dtype and y.shape == exact.shape
    rounding = torch.finfo(x.dtype).eps / 2 * (exact.abs() + error)
    assert bool(((y - exact).abs() <= rounding + error).all())


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["w_fp32", "w_bf16"])
def test_linear(variant: str, dtype: torch.dtype, weights: torch.dtype) -> None:
    for M, N, K in shapes(1, 30) + LARGE:
        x, w = inputs(M, N, K, dtype)
        w = w.to(weights)
        check(torch.ops.llama3.linear(x, w), x, w)


@DTYPES
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["w_fp32", "w_bf16"])
def test_linears(variant: str, dtype: torch.dtype, weights: torch.dtype) -> None:
    """Several matrices of different heights in one call; threads split them at any row."""
    for M, K in ((1, 700), (3, 2081), (17, 64), (0, 64)):
        x = inputs(M, 1, K, dtype)[0]
        ws = [inputs(1, N, K, dtype)[1].to(weights) for N in (90, 1, 257, 3)]
        ys = torch.ops.llama3.linears(x, ws)
        assert [y.shape for y in ys] == [(M, N) for N in (90, 1, 257, 3)]
        for y, w in zip(ys, ws, strict=True):
            check(y, x, w)
    with pytest.raises(RuntimeError, match="all w must be"):
        torch.ops.llama3.linears(x, [ws[0], ws[1].to(torch.float16)])
    with pytest.raises(RuntimeError, match="give at least one w"):
        torch.ops.llama3.linears(x, [])
    with pytest.raises(RuntimeError, match="as wide as w"):
        torch.ops.llama3.linears(x, [ws[0], ws[1][:, :7].contiguous()])


@DTYPES
def test_linear_int8(variant: str, dtype: torch.dtype) -> None:
    for M, N, K in shapes(2, 30) + LARGE:
        x, w = inputs(M, N, K, dtype)
        q, scale = quantize_int8(w)
        check(torch.ops.llama3.linear_int8(x, q, scale), x, q.double() * scale.double()[:, None])


@DTYPES
@pytest.mark.parametrize("group", [32, 64, 128])
def test_linear_int4(variant: str, dtype: torch.dtype, group: int) -> None:
    for M, N, K in [*shapes(3, 15, multiple=group), (29, 37, 384), (11, 16, 4096), (5, 20, 256)]:
        x, w = inputs(M, N, K, dtype)
        packed, scale, zero = quantize_int4(w, group)
        y = torch.ops.llama3.linear_int4(x, packed, scale, zero, N)
        # The kernel sums codes and zeros separately; each is larger than the weight itself.
        terms = dequantize_int4(packed, scale, zero.abs(), N)
        check(y, x, dequantize_int4(packed, scale, zero, N), terms)


def test_a_row_of_a_prompt_is_the_same_beside_other_rows(ops: object) -> None:
    """Bit for bit, for any number of rows that prefill.h takes and any number of threads."""
    x, w = inputs(300, 61, 1100, torch.bfloat16)
    w, threads = w.bfloat16(), torch.get_num_threads()
    want = torch.ops.llama3.linear(x, w)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for begin, end in ((0, 300), (0, 64), (17, 113), (201, 300)):
                assert torch.equal(torch.ops.llama3.linear(x[begin:end], w), want[begin:end])
    finally:
        torch.set_num_threads(threads)


def test_extreme_weights(variant: str) -> None:
    x = torch.ones(1, 64)
    w = torch.full((2, 64), -127, dtype=torch.int8)
    assert torch.ops.llama3.linear_int8(x, w, torch.ones(2)).tolist() == [[-8128.0] * 2]
    codes = torch.full((1, 8, 16), -1, dtype=torch.int32)  # all 15
    one, none = torch.ones(1, 2, 16).bfloat16(), torch.zeros(1, 2, 16).bfloat16()
    assert torch.ops.llama3.linear_int4(x, codes, one, none, 16).tolist() == [[960.0] * 16]
    inf = torch.tensor([[1.0, float("inf")]])  # the next row is not read
    assert torch.ops.llama3.linear(torch.tensor([[1.0]]), inf.T.contiguous()).tolist() == [
        [1.0, float("inf")]
    ]


@DTYPES
@pytest.mark.parametrize("M", [1, 3, 14, 40, 70])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_no_infinity_or_nan_is_lost_or_spread(
    variant: str, dtype: torch.dtype, M: int, value: float
) -> None:
    """At any place, also in columns and rows that a tile computes together."""
    x, w = inputs(M, 21, 96, dtype)
    q, scale = quantize_int8(w)
    packed, steps, zero = quantize_int4(w)
    uneven = w[:, :90].to(dtype).contiguous()
    for row, column in ((0, 0), (M - 1, 89), (M // 2, 40)):
        bad = x.clone()
        bad[row, column] = value
        y = torch.ops.llama3.linear(bad[:, :90], uneven)
        exact = bad[:, :90].double() @ uneven.double().T
        left, want = (t.double().masked_fill(t.isfinite(), 0) for t in (y, exact))
        torch.testing.assert_close(left, want, equal_nan=True)
        for y in (
            torch.ops.llama3.linear_int8(bad, q, scale),
            torch.ops.llama3.linear_int4(bad, packed, steps, zero, 21),
        ):  # 0 times infinity is NaN, and a code may be 0 where the weight is not
            assert y.isfinite().any(dim=1).tolist() == [m != row for m in range(M)]
            assert y.isfinite().all(dim=1).tolist() == [m != row for m in range(M)]
    for n, k in ((1, 0), (20, 89), (16, 31)):
        bad = uneven.clone()
        bad[n, k] = value
        finite = torch.ops.llama3.linear(x[:, :90], bad).isfinite()
        assert finite.tolist() == [[column != n for column in range(21)]] * M


def test_many_dimensions_views_and_empty_tensors(ops: object) -> None:
    linear = torch.ops.llama3.linear
    w = torch.randn(6, 8)
    x = torch.randn(8, 3, 2).transpose(0, 2)  # (2, 3, 8), not contiguous
    torch.testing.assert_close(linear(x, w), F.linear(x, w))
    torch.testing.assert_close(linear(x[0, 0], w), F.linear(x[0, 0], w))
    assert linear(torch.empty(0, 8), w).shape == (0, 6)
    assert linear(torch.empty(2, 8), torch.empty(0, 8)).shape == (2, 0)
    assert linear(torch.empty(2, 0), torch.empty(3, 0)).tolist() == [[0.0] * 3] * 2


def test_errors_name_the_argument(ops: object) -> None:
    linear, w = torch.ops.llama3.linear, torch.randn(6, 8)
    with pytest.raises(RuntimeError, match="as wide as w"):
        linear(torch.randn(2, 7), w)
    with pytest.raises(RuntimeError, match="x must be fp32 or bf16"):
        linear(torch.randn(2, 8).half(), w)
    with pytest.raises(RuntimeError, match="w must be contiguous"):
        linear(torch.randn(2, 6), w.T)
    with pytest.raises(RuntimeError, match="scale must be fp32"):
        torch.ops.llama3.linear_int8(torch.randn(8), w.to(torch.int8), torch.ones(5))
    packed, scale, zero = quantize_int4(torch.randn(16, 64))
    with pytest.raises(RuntimeError, match="packed must be int32"):
        torch.ops.llama3.linear_int4(torch.randn(64), packed, scale, zero, 17)
    with pytest.raises(RuntimeError, match="scale and zero"):
        torch.ops.llama3.linear_int4(torch.randn(64), packed, scale, zero[:, :1], 16)
    with pytest.raises(RuntimeError, match="no variant"):
        torch.ops.llama3.use_variant("abacus")
    with pytest.raises(ValueError, match="do not divide 48 columns"):
        quantize_int4(torch.randn(4, 48))


def test_quantizing_and_back() -> None:
    w = torch.randn(37, 256)
    q, scale = quantize_int8(w)
    assert bool(((dequantize_int8(q, scale) - w).abs() <= scale[:, None] * 0.501).all())
    assert not dequantize_int8(*quantize_int8(torch.zeros(2, 8))).any()
    packed, steps, zero = quantize_int4(w, 64)
    assert packed.shape == (3, 32, 16) and steps.shape == zero.shape == (3, 4, 16)
    # Half a step, and at the ends of the range the rounding of scale and zero to bf16.
    step = steps.float().transpose(1, 2).reshape(48, 4)[:37].repeat_interleave(64, dim=1)
    back = dequantize_int4(packed, steps, zero, 37)
    assert bool(((back - w).abs() <= 0.6 * step).all())
    grid = torch.arange(16).repeat(4, 4) * 0.25 - 2  # already on a grid: exact
    torch.testing.assert_close(dequantize_int4(*quantize_int4(grid), 4), grid, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unpack_int4(variant: str, dtype: torch.dtype) -> None:
    for N, K, group in [(1, 32, 32), (16, 64, 64), (37, 384, 128), (130, 96, 32)]:
        packed, scale, zero = quantize_int4(torch.randn(N, K), group)
        x = torch.empty(2, K, dtype=dtype)
        got = torch.ops.llama3.unpack_int4(x, packed, scale, zero, N)
        want = dequantize_int4(packed, scale, zero, N).to(dtype)
        assert got.dtype == dtype
        # With fused multiply-add there is one rounding less.
        torch.testing.assert_close(
            got, want, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6
        )
        assert (got == want).float().mean() > 0.95


def test_widen_int8(variant: str) -> None:
    q = torch.arange(-128, 128, dtype=torch.int8)
    for n in (0, 1, 17, 256):
        assert torch.equal(torch.ops.llama3.widen_int8(q[:n]), q[:n].to(torch.bfloat16))


@pytest.mark.usefixtures("exact_products")
def test_dispatch_by_rows(ops: object) -> None:
    """For more rows than MAX_ROWS or with a gradient, torch's operators give the same numbers."""
    w = torch.randn(24, 64)
    q, scale = quantize_int8(w)
    packed, steps, zero = quantize_int4(w)
    for M in (1, 40):
        x = torch.randn(M, 64, requires_grad=True)
        for y, oracle in (
            (kernels.linear(x, w), w),
            (linear_int8(x, q, scale), dequantize_int8(q, scale)),
            (linear_int4(x, packed, steps, zero, 24), dequantize_int4(packed, steps, zero, 24)),
        ):
            assert y.requires_grad
            torch.testing.assert_close(y, F.linear(x, oracle))
        with torch.inference_mode():
            assert kernels.is_fastest("bf16", x) == (M == 1)
            torch.testing.assert_close(linear_int8(x, q, scale), x @ dequantize_int8(q, scale).T)
    assert kernels.linear(torch.randn(1, 64, requires_grad=True), w).requires_grad
    assert kernels.linear(torch.randn(1, 64), w.clone().requires_grad_()).requires_grad


def test_fake_tensors_have_the_shape(ops: object) -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, 64, dtype=torch.bfloat16)
        y = torch.ops.llama3.linear(x, torch.empty(5, 64))
        assert y.shape == (2, 3, 5) and y.dtype == torch.bfloat16
        q = torch.empty(5, 64, dtype=torch.int8)
        assert torch.ops.llama3.linear_int8(x, q, torch.empty(5)).shape == (2, 3, 5)
        packed, scale, zero = quantize_int4(torch.empty(21, 64))
        assert torch.ops.llama3.linear_int4(x, packed, scale, zero, 21).shape == (2, 3, 21)


def test_torch_compile_calls_them(ops: object) -> None:
    w = torch.randn(24, 64)
    q, scale = quantize_int8(w)
    packed = quantize_int4(w)

    def step(x: Tensor) -> Tensor:
        y = F.silu(kernels.linear(x, w)) * linear_int8(x, q, scale)
        return y + linear_int4(x, *packed, 24)

    seen: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    x = torch.randn(1, 64)
    with torch.inference_mode():
        compiled = torch.compile(step, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), step(x))
        for name in ("linear", "linear_int8", "linear_int4"):
            assert any(f"llama3.{name}" in str(target).replace("::", ".") for target in seen), seen
