"""Gradients through quantized linears. The oracle is F.linear with the dequantized weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.layers import kernels, quantized_grad
from llama.layers.gpu_modules import TinygemmLinear
from llama.layers.joined import join
from llama.layers.quantized_linear import Int4Linear, Int8Linear, weight_blocks

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(kind: str, N: int, K: int) -> nn.Module:
    weight = random(N, K) * K**-0.5
    return Int8Linear(weight) if kind == "int8" else Int4Linear(weight, int(kind[5:]))


def gradients(linear: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Of x: by the linear, and by autograd through the dequantized weight in fp32."""
    weight = torch.cat(list(weight_blocks(linear)))
    found, wanted = x.detach().requires_grad_(), x.detach().float().requires_grad_()
    linear(found).backward(grad)
    F.linear(wanted, weight).backward(grad.float())
    assert found.grad is not None and wanted.grad is not None
    assert found.grad.dtype == x.dtype
    return found.grad.float(), wanted.grad


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("kind", ["int8", "int4-32", "int4-128"])
@pytest.mark.parametrize(("N", "K"), [(24, 128), (48, 640)])
def test_gradient_is_that_of_the_dequantized_weight(
    kind: str,
    dtype: torch.dtype,
    kernel: bool,
    N: int,
    K: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quantized_grad, "BLOCK_SIZE", 256 * 48)  # 256 columns of 48 rows
    if not kernel:
        monkeypatch.setattr(kernels, "_loaded", False)
    linear = make(kind, N, K)
    for rows in ((1,), (2, 5), (70,)):
        x, grad = random(*rows, K, seed=1).to(dtype), random(*rows, N, seed=2).to(dtype)
        found, wanted = gradients(linear, x, grad)
        assert (found - wanted).abs().max() <= CLOSE[dtype] * wanted.abs().max()


@pytest.mark.parametrize("kind", ["int8", "int4-32"])
def test_forward_is_that_without_gradients_and_saves_no_weight(kind: str) -> None:
    linear, saved = make(kind, 200, 256), 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    x = random(3, 256)
    with torch.no_grad():
        wanted = linear(x)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = linear(x.requires_grad_())
    assert torch.equal(y, wanted) and y.requires_grad
    assert saved <= sum(buffer.nbytes for buffer in linear.buffers())


@pytest.mark.parametrize("kind", ["int8", "int4-32"])
def test_backward_never_has_the_whole_weight(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operation of the backward pass returns a tensor of the weight's size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.is_floating_point():
                largest = max(largest, out.numel())
            return out

    monkeypatch.setattr(quantized_grad, "BLOCK_SIZE", 128 * 256)
    linear, x = make(kind, 256, 1024), random(2, 1024).requires_grad_()
    y = linear(x)
    with Sizes():  # type: ignore[no-untyped-call]
        y.backward(torch.ones_like(y))
    assert 0 < largest <= 128 * 256


def test_joined_linears_have_the_gradient_of_their_parts() -> None:
    parts = [make("int4-32", n, 64) for n in (32, 16, 24)]
    whole = join(*parts)
    assert whole is not None
    x, grads = random(4, 64), [random(4, n, seed=n) for n in (32, 16, 24)]
    found, _ = gradients(whole, x, torch.cat(grads, dim=1))
    wanted = sum(gradients(*case)[0] for case in zip(parts, [x] * 3, grads, strict=True))
    assert isinstance(wanted, Tensor)
    torch.testing.assert_close(found, wanted)


def test_tinygemm_linear_has_a_gradient_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight is found by multiplying unit vectors; the CUDA kernel is a plain matmul here."""
    linear = Int4Linear(random(40, 128))
    weight = torch.cat(list(linear.row_parts())).bfloat16()
    padded = F.pad(weight, (0, 0, 0, 8))
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda pairs, inner: pairs)
    monkeypatch.setattr(torch, "_weight_int4pack_mm", lambda x, *rest: x @ padded.T)
    tinygemm = TinygemmLinear(linear, unpack=False)
    assert (tinygemm.out_features, tinygemm.in_features) == (40, 128)
    assert torch.equal(torch.cat(list(tinygemm.row_parts())), weight.float())
    found, wanted = gradients(tinygemm, random(2, 3, 128).bfloat16(), random(2, 3, 40).bfloat16())
    assert (found - wanted).abs().max() <= CLOSE[torch.bfloat16] * wanted.abs().max()
