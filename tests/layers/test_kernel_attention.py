"""Attention over a cache by the CPU kernel, against the formula in fp64."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from llama.layers.attention import KernelAttention
from llama.model import CacheSlice, DotProductAttention

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
kernel_attention, plain_attention = KernelAttention(), DotProductAttention()
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(B: int, T: int, H: int, K: int, D: int, S: int, dtype: torch.dtype) -> Inputs:
    """Queries, and keys and values as views of a larger cache, with NaN after the last position."""
    generator = torch.Generator().manual_seed(B * T + H * K + D + S)
    xq = torch.randn(B, T, H, D, generator=generator).to(dtype)
    positions = torch.randint(0, S, (B, T), generator=generator)
    cache = torch.randn(2, B + 2, S + 5, K, D, generator=generator).to(dtype)
    keys, values = cache.narrow(1, 1, B).narrow(2, 3, S)
    for row in range(B):
        keys[row, positions[row].max() + 1 :] = float("nan")
        values[row, positions[row].max() + 1 :] = float("nan")
    return xq, keys, values, positions


def where(positions: Tensor) -> CacheSlice:
    """Of which the kernel reads the positions only."""
    unused = torch.empty(0)
    return CacheSlice(unused, positions, unused, unused, unused, 0, 0)


def check(got: Tensor, xq: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> None:
    """Each query alone over its visible keys in fp64, then one rounding to the dtype.

    For prompts in bf16, each weight of the softmax and their sum may also be rounded to bf16.
    """
    assert got.dtype == xq.dtype and got.shape == xq.shape
    in_bf16 = xq.dtype == torch.bfloat16 and xq.shape[1] > 16
    for b, row in enumerate(positions.expand(len(xq), -1).tolist()):
        for t, last in enumerate(row):
            k, v = (x[b : b + 1, : last + 1].double() for x in (keys, values))
            want = plain_attention(xq[b : b + 1, t : t + 1].double(), k, v, None)[0, 0]
            bound = torch.finfo(xq.dtype).eps * want.abs() + 1e-5
            if in_bf16:
                q = xq[b : b + 1, t : t + 1].double()
                bound = bound + 2**-8 * plain_attention(q, k, v.abs(), None)[0, 0]
            assert bool(((got[b, t] - want).abs() <= bound).all())


@DTYPES
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("D", [16, 20, 64, 80, 128])
def test_attend(variant: str, dtype: torch.dtype, group: int, D: int) -> None:
    draw = random.Random(D + group)
    for B, T, S in [
        (1, 1, 1),
        (2, 1, 300),
        (3, 1, draw.randint(2, 200)),
        (2, 5, 131),
        (1, 40, 70),
        (2, 23, 150),
    ]:
        K = draw.randint(1, 3)
        tensors = inputs(B, T, group * K, K, D, S, dtype)
        check(torch.ops.llama3.attend(*tensors), *tensors)


def test_weights_of_a_prompt_add_up_to_one(ops: object) -> None:
    """Rounded to bf16 or not: values that are all alike come out unchanged."""
    xq, keys, values, positions = inputs(2, 70, 6, 2, 64, 300, torch.bfloat16)
    values[:] = torch.randn(64).bfloat16()
    got = torch.ops.llama3.attend(xq, keys, values, positions)
    assert torch.equal(got, values[:, :1, :1].expand_as(got))


@DTYPES
def test_any_number_of_threads(ops: object, dtype: torch.dtype) -> None:
    """With few heads, the keys of a row are split between threads and the parts are merged."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for B, T, H, K, S in [(1, 1, 9, 3, 3001), (3, 1, 8, 2, 1500), (1, 130, 6, 2, 400)]:
                tensors = inputs(B, T, H, K, 64, S, dtype)
                tensors[3][0, -1] = 2  # this query has keys in the first part only
                check(torch.ops.llama3.attend(*tensors), *tensors)
        torch.set_num_threads(96)  # 96 parts of 65 keys are more keys than there are
        tensors = inputs(1, 1, 64, 8, 128, 6200, dtype)
        tensors[3][0, 0] = 6160
        tensors[1].nan_to_num_(0.1), tensors[2].nan_to_num_(0.2)
        check(torch.ops.llama3.attend(*tensors), *tensors)
    finally:
        torch.set_num_threads(before)


def test_one_position_for_all_rows_and_large_scores(variant: str) -> None:
    xq, keys, values, _ = inputs(3, 2, 4, 2, 32, 90, torch.float32)
    keys, values = torch.randn_like(keys) * 100, torch.randn_like(values)
    positions = torch.tensor([[88, 89]])
    got = torch.ops.llama3.attend(xq, keys, values, positions)
    assert bool(got.isfinite().all())
    for row in range(3):
        alone = [x[row : row + 1] for x in (xq, keys, values)]
        torch.testing.assert_close(
            got[row : row + 1], torch.ops.llama3.attend(*alone, positions), rtol=0, atol=0
        )
    values[:, 5] = float("nan")  # NaN in a visible value reaches the result
    assert bool(torch.ops.llama3.attend(xq, keys, values, positions).isnan().all())


def test_errors_name_the_argument(ops: object) -> None:
    attend = torch.ops.llama3.attend
    xq, keys, values, positions = inputs(2, 3, 4, 2, 16, 9, torch.float32)
    for bad in (9, -1):
        with pytest.raises(RuntimeError, match=f"position {bad} is outside the 9"):
            attend(xq, keys, values, torch.full((2, 3), bad))
    for at in (positions.int(), positions[:, :2], positions[0], positions.repeat(2, 1)):
        with pytest.raises(RuntimeError, match="positions must be int64"):
            attend(xq, keys, values, at)
    with pytest.raises(RuntimeError, match="xq must be fp32 or bf16"):
        attend(xq.half(), keys.half(), values.half(), positions)
    with pytest.raises(RuntimeError, match="keys and values must be"):
        attend(xq, keys.bfloat16(), values, positions)
    for k, v in ((keys[:1], values[:1]), (keys[..., :8], values[..., :8]), (keys, values[:, :8])):
        with pytest.raises(RuntimeError, match="xq must be \\(B, T, H, D\\)"):
            attend(xq, k, v, positions)
    with pytest.raises(RuntimeError, match="do not divide"):
        attend(xq[:, :, :3], keys, values, positions)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        attend(xq, keys.transpose(2, 3).contiguous().transpose(2, 3), values, positions)
    assert attend(xq[:0], keys[:0], values[:0], positions[:0]).shape == (0, 3, 4, 16)


def test_where_the_kernel_cannot_run(ops: object) -> None:
    """Without positions, with a gradient or in fp16, torch's operators give the same numbers."""
    xq, keys, values = torch.randn(2, 5, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16)
    positions = torch.tensor([[4, 5, 6, 7, 8]])
    mask = torch.arange(9) <= positions[0].unsqueeze(1)
    at, first = where(positions), where(positions[:, :1])
    want = plain_attention(xq, keys, values, mask)
    torch.testing.assert_close(kernel_attention(xq, keys, values, mask), want)
    torch.testing.assert_close(kernel_attention(xq, keys, values, mask, at), want)
    grown = xq[:, :1].clone().requires_grad_()
    assert kernel_attention(grown, keys, values, mask[:1], first).requires_grad
    half = [x.half() for x in (xq, keys, values)]
    got = kernel_attention(*half, mask, at)
    torch.testing.assert_close(got.float(), want, atol=5e-3, rtol=5e-3)
    with torch.inference_mode():  # the kernel runs, which ignores the mask
        single = kernel_attention(xq[:, :1], keys, values, None, first)
        torch.testing.assert_close(single, want[:, :1])


def test_compiled_and_fake(ops: object) -> None:
    xq, keys, values, positions = inputs(2, 1, 4, 2, 16, 9, torch.bfloat16)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (xq, keys, values, positions)]
        out = torch.ops.llama3.attend(*fakes)
        assert out.shape == xq.shape and out.dtype == xq.dtype and out.is_contiguous()
    with torch.inference_mode():
        compiled = torch.compile(kernel_attention, fullgraph=True, backend="eager")
        at = where(positions)
        want = kernel_attention(xq, keys, values, None, at)
        assert torch.equal(compiled(xq, keys, values, None, at), want)
