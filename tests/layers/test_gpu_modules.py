"""Modules for NVIDIA's GPUs, as far as a CPU can tell: what they compute, and on fake CUDA tensors.

tests/cuda runs them on a GPU.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llama.engine.sampling import sample_rows
from llama.layers import cuda_ops, gpu_modules
from llama.layers.attention import FlashAttention
from llama.layers.gpu_modules import (
    FusedRMSNorm,
    JoinedFeedForward,
    JoinedHeads,
    TinygemmLinear,
    TritonLinear,
)
from llama.layers.optimize import JOINED, optimize
from llama.layers.quantized_linear import Int4Linear, Int8Linear, quantized
from llama.layers.replace import factory_of, replace_modules
from llama.model import ModelArgs, RMSNorm, Transformer
from tests.models import random_weights

SHAPE: dict[str, Any] = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
SHAPE |= {"vocab_size": 100, "multiple_of": 32}


def make_model() -> Transformer:
    model = Transformer(ModelArgs(**SHAPE, max_seq_len=64, max_batch_size=3))
    model.load_state_dict(random_weights(**SHAPE))
    return model.requires_grad_(False)


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_joined_linears(scheme: str | None) -> None:
    """One matmul for neighbouring linears gives what they give one by one."""
    model, tokens = make_model(), torch.arange(14).view(2, 7)
    if scheme is not None:
        replace_modules(model, {nn.Linear: quantized(scheme)})
    expected = model(tokens)
    size = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    replace_modules(model, JOINED)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(JoinedHeads) == kinds.count(JoinedFeedForward) == 2
    linears = [module for module in model.modules() if "Linear" in type(module).__name__]
    assert len(linears) == 4 * 2 + 1  # of 7 a layer, and the output
    assert sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) == size
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)


def test_linears_that_cannot_be_joined() -> None:
    """Rows of int4 that do not fill tiles; linears of two kinds."""
    tiles = [Int4Linear(torch.randn(n, 64)) for n in (24, 16)]
    assert gpu_modules.join(*tiles) is None
    assert gpu_modules.join(*reversed(tiles)) is not None
    assert gpu_modules.join(nn.Linear(4, 4, bias=False), Int8Linear(torch.randn(4, 4))) is None


def test_norm() -> None:
    """One rounding instead of two, in bf16."""
    norm, x = RMSNorm(64, 1e-5), torch.randn(3, 64)
    norm.weight.data = torch.rand(64)
    fused = factory_of(FusedRMSNorm)("norm", norm)
    torch.testing.assert_close(fused(x), norm(x))
    half = fused.to(torch.bfloat16)(x.bfloat16()).float()
    torch.testing.assert_close(half, norm.float()(x), rtol=2e-2, atol=2e-2)


def linear_one_row(x: Tensor, w: Tensor) -> Tensor:
    raise AssertionError("only the shapes of fake tensors are asked for")


def linear_int8(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    raise AssertionError("only the shapes of fake tensors are asked for")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the operators stay registered")
def test_every_tensor_is_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill, decoding and drawing on fake CUDA tensors: a CPU tensor among them would raise."""
    triton = ModuleType("triton_kernels")
    monkeypatch.setattr(triton, "linear_one_row", linear_one_row, raising=False)
    monkeypatch.setattr(triton, "linear_int8", linear_int8, raising=False)
    monkeypatch.setitem(sys.modules, "llama.layers.triton_kernels", triton)
    monkeypatch.setattr("llama.layers.triton_kernels", triton, raising=False)
    monkeypatch.setattr("llama.layers.optimize.supports_triton", lambda device: True)
    cuda_ops.load()
    plain = make_model()
    shapes = {name: w.shape for name, w in plain.state_dict().items()}
    with FakeTensorMode(allow_non_fake_inputs=False), torch.inference_mode():
        with torch.device("meta"):
            model = Transformer(plain.params)
        weights = {
            n: torch.empty(s, dtype=torch.bfloat16, device="cuda") for n, s in shapes.items()
        }
        model.load_state_dict(weights, assign=True)
        optimize(model)
        kinds = {type(module) for module in model.modules()}
        wanted = {FlashAttention, FusedRMSNorm, JoinedHeads, JoinedFeedForward}
        assert wanted | {TritonLinear} <= kinds
        cache = model.new_cache(3, 64)
        for rows, T, start in ((3, 5, 0), (3, 5, None), (1, 1, None), (2, 1, None)):
            tokens = torch.ones(rows, T, dtype=torch.long, device="cuda")
            at = torch.ones(rows, dtype=torch.long, device="cuda") if start is None else start
            h = model.hidden(tokens, at, cache, 64)
            assert h.shape == (rows, T, 128) and h.device.type == "cuda"
        logits = model.logits(h).squeeze(1)
        settings = [torch.empty(2, device="cuda", dtype=torch.float32) for _ in range(4)]
        ids = sample_rows(logits, settings, settings[0], True)
    assert ids.shape == (2,) and ids.device.type == "cuda" and ids.dtype == torch.int64


def test_tinygemm_dequantizes_for_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Int4Linear(torch.randn(40, 128))
    weight = torch.randn(40, 128)
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda pairs, inner: pairs)
    monkeypatch.setattr(TinygemmLinear, "dequantized", lambda self: weight)
    kernel = TinygemmLinear(linear)
    for rows in (gpu_modules.INT4_ROWS + 1, 200):
        x = torch.randn(rows, 128)
        torch.testing.assert_close(kernel(x), x @ weight.T)
