"""Quantized linears and `optimize`: replacements compute what the plain modules compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llama import Llama, ModelArgs, Transformer
from llama.layers import kernels
from llama.layers.gpu_modules import TinygemmLinear, tinygemm_or_same
from llama.layers.kernel_modules import KernelLinear
from llama.layers.optimize import optimize, quantize_model
from llama.layers.quantization import (
    codes_int4,
    dequantize_int4,
    dequantize_int8,
    quantize_int4,
    scales_and_zeros_int4,
)
from llama.layers.quantized_linear import QUANTIZED, BlockLinear, Int4Linear, Int8Linear
from tests.models import random_weights

SHAPE: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
SHAPE |= {"vocab_size": 200, "max_seq_len": 64, "max_batch_size": 3, "multiple_of": 32}
TOKENS = torch.arange(80).view(2, 40)


def make_model(dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(ModelArgs(**SHAPE))
    model.load_state_dict(random_weights(**SHAPE))
    return model.eval().to(dtype)


def with_dequantized_weights(model: Transformer) -> Transformer:
    """A plain model with the dequantized weights of `model`."""
    plain = make_model()
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            w = dequantize_int8(module.q, module.scale)
        elif isinstance(module, QUANTIZED):
            w = torch.cat(list(module.row_parts()))
        else:
            continue
        linear = plain.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight.data = w
    return plain


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@torch.inference_mode()
def test_quantized_model_is_the_dequantized_one(scheme: str) -> None:
    model = make_model()
    quantize_model(model, scheme)
    optimize(model)
    plain, untouched = with_dequantized_weights(model), make_model()
    for tokens in (TOKENS, TOKENS[:1, :3]):  # more rows than is fastest by kernels, and fewer
        want = plain(tokens)
        torch.testing.assert_close(model(tokens), want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(tokens, 0), want, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(want, untouched(tokens), atol=1e-3)
    kind = Int8Linear if scheme == "int8" else BlockLinear
    found = [type(m) for m in model.modules() if isinstance(m, QUANTIZED)]
    assert found == [kind] * (7 * 2 + 1) and not any(
        isinstance(m, nn.Linear) for m in model.modules()
    )


@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.02), ("int4", 0.2)])
def test_quantized_weights_are_close(scheme: str, most: float) -> None:
    model = make_model()
    quantize_model(model, scheme)
    optimize(model)
    found = dict(with_dequantized_weights(model).named_parameters())
    for name, w in make_model().named_parameters():
        if "norm" not in name:
            assert (found[name] - w).norm() / w.norm() < most, name


@pytest.mark.skipif(not kernels.load(), reason="no CPU kernels here")
def test_kernels_share_the_weights_and_names() -> None:
    model = make_model(torch.bfloat16)
    model.output.weight = model.tok_embeddings.weight  # tied
    before = {name: w.data_ptr() for name, w in model.state_dict().items()}
    optimize(model)
    assert {name: w.data_ptr() for name, w in model.state_dict().items()} == before
    assert sum(isinstance(m, KernelLinear) for m in model.modules()) == 15
    exact = make_model(torch.bfloat16)
    exact.output.weight = exact.tok_embeddings.weight
    optimize(exact, exact=True)
    assert not any(isinstance(m, KernelLinear) for m in exact.modules())
    with torch.inference_mode():
        torch.testing.assert_close(model(TOKENS, 0), exact(TOKENS, 0), atol=0.1, rtol=0.1)
        step = model(TOKENS[:, :1], 40), exact(TOKENS[:, :1], 40)
        torch.testing.assert_close(*step, atol=0.1, rtol=0.1)


def test_an_optimized_model_can_be_trained() -> None:
    model = make_model()
    optimize(model)
    model(TOKENS[:, :2]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("grad", [False, True])
def test_float16_does_not_overflow(grad: bool) -> None:
    """Sums of codes up to 127 over many inputs are outside its range before they are scaled."""
    linear = Int8Linear(torch.full((4, 4096), 0.01))
    x = torch.ones(3, 4096, dtype=torch.float16, requires_grad=grad)
    torch.testing.assert_close(linear(x), torch.full((3, 4), 40.96).half())


@pytest.mark.usefixtures("exact_products")
@pytest.mark.skipif(not kernels.load(), reason="no CPU kernels here")
@pytest.mark.parametrize("rows", [1, 40])
@torch.inference_mode()
def test_float16_is_computed_in_float32(rows: int) -> None:
    """Weights are not rounded to float16, only the result is."""
    x, w = torch.randn(rows, 2048).half(), torch.randn(40, 2048)
    eight, four = Int8Linear(w), Int4Linear(w)
    for found, plain in (
        (eight(x), dequantize_int8(eight.q, eight.scale)),
        (four(x), dequantize_int4(four.packed, four.scale, four.zero, 40)),
    ):
        want = x.double() @ plain.double().T
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.double(), want, rtol=2**-11, atol=1e-4)


@pytest.fixture(scope="module")
def build(tiny_checkpoint: Callable[..., Path], byte_tokenizer_path: Path) -> Callable[..., Llama]:
    folder = tiny_checkpoint(dim=64, multiple_of=32, vocab_size=512)

    def build(**options: Any) -> Llama:
        path = byte_tokenizer_path
        return Llama.build(folder, path, 64, 4, device="cpu", dtype=torch.float32, **options)

    return build


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_rows_of_a_quantized_model_are_independent(
    build: Callable[..., Llama], scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="llama"):
        llama = build(quantize=scheme)
    assert f"float32 and {scheme}" in caplog.text
    prompts = [[256, 9, 8, 7], [256, *range(480, 500)], [256], [256, *range(40)]]
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 7}):
        together, _ = llama.generate(prompts, 12, **options)
        alone = [llama.generate([p], 12, **options)[0][0] for p in prompts]
        assert together == alone


def test_bad_quantization(
    build: Callable[..., Llama], tiny_checkpoint: Callable[..., Path], byte_tokenizer_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"unknown scheme 'int5'; use one of \['int8', 'int4'\]"):
        build(quantize="int5")
    odd = tiny_checkpoint(dim=48, vocab_size=512)
    with pytest.raises(ValueError, match=r"layers.0.attention.wq: groups of 32 do not divide 48"):
        Llama.build(odd, byte_tokenizer_path, 8, 1, device="cpu", quantize="int4")
    model = make_model()
    quantize_model(model, "int8")
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(model, "int8")


@pytest.mark.parametrize(
    ("scheme", "most"), [pytest.param("int8", 1.01, marks=pytest.mark.slow), ("int4", 1.03)]
)
def test_perplexity_of_the_demo_model(
    demo: Llama, demo_dir: Path, scheme: str, most: float
) -> None:
    """docs/performance.md has it on 20,000 tokens."""
    text = (Path(__file__).parents[2] / "README.md").read_text("utf-8")[:1500]
    quantized = Llama.build(
        demo_dir, None, 256, 8, device="cpu", dtype=torch.float32, quantize=scheme
    )
    ratio = quantized.perplexity(text).perplexity / demo.perplexity(text).perplexity
    assert 1 / most < ratio < most


@pytest.mark.parametrize("group", [32, 64, 128])
def test_torchs_int4_layout(group: int) -> None:
    """By torch's int4 matmul for CPUs, which has the same layout as the one for CUDA."""
    w, x = torch.randn(48, 256) + 0.3, torch.randn(3, 256).bfloat16()
    packed, scale, zero = quantize_int4(w, group)
    theirs = torch._convert_weight_to_int4pack_for_cpu(codes_int4(packed), 1)
    scales_and_zeros = scales_and_zeros_int4(scale, zero)
    found = torch._weight_int4pack_mm_for_cpu(x, theirs, group, scales_and_zeros)
    want = x.double() @ dequantize_int4(packed, scale, zero, 48).double().T
    # Rounding zeros to bf16 changes each product by at most 2^-9 of the largest zero.
    bound = x.double().abs().sum(1, keepdim=True) * scales_and_zeros.abs().max() * 2**-8
    assert ((found - want).abs() <= bound).all()


def test_int4_on_cuda_by_fake_tensors() -> None:
    with FakeTensorMode():
        linear = Int4Linear(torch.empty(40, 192), 64)
        for name, t in list(linear.named_buffers()):
            linear.register_buffer(name, torch.empty(t.shape, dtype=t.dtype, device="cuda"))
        packed = TinygemmLinear(linear)
        y = packed(torch.empty(2, 5, 192, dtype=torch.bfloat16, device="cuda"))
    assert y.shape == (2, 5, 40) and y.device.type == "cuda" and y.dtype == torch.bfloat16
    assert packed.weight.device.type == packed.scales_and_zeros.device.type == "cuda"
    assert packed.weight.numel() * 4 == 48 * 192 / 2  # the same size, rounded up to whole tiles


def test_an_int4_kernel_with_wrong_results_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tinygemm_or_same` compares results; the fake of the CUDA kernel is right, then wrong."""
    linear = Int4Linear(torch.randn(40, 512), 32)
    right = dequantize_int4(linear.packed, linear.scale, linear.zero, 48).bfloat16()
    swapped = right.unflatten(1, (-1, 2)).flip(2).flatten(1)  # even and odd columns
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda pairs, inner: pairs)
    monkeypatch.setattr("llama.layers.gpu_modules.triton_works", lambda device: True)
    for w in (right, right * 1.1, swapped):
        monkeypatch.setattr(torch, "_weight_int4pack_mm", lambda x, *rest, w=w: x @ w.T)
        for unpacked in (right, swapped):  # which is checked by itself
            monkeypatch.setattr(TinygemmLinear, "dequantized", lambda self, u=unpacked: u[:40])
            if w is right:
                replacement = tinygemm_or_same("w1", linear)
                assert isinstance(replacement, TinygemmLinear)
                assert replacement.unpack == (unpacked is right)
            else:
                with pytest.warns(UserWarning, match="w1: torch's int4 kernel"):
                    assert tinygemm_or_same("w1", linear) is linear
