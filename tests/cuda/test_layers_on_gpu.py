"""Replaced layers on a GPU against the plain path in fp32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llama import ModelArgs, Transformer
from llama.layers.optimize import optimize
from llama.layers.quantization import dequantize_int4, dequantize_int8
from llama.layers.quantized_linear import Int4Linear, Int8Linear, quantized
from llama.model import DotProductAttention
from tests.cuda.cases import DEVICE
from tests.models import random_weights

pytestmark = pytest.mark.cuda

# Widths that are not multiples of 64, and the smallest that int4's groups divide.
ODD: dict[str, Any] = {"dim": 160, "n_heads": 5, "n_kv_heads": 1, "multiple_of": 32}
WIDE: dict[str, Any] = {"dim": 1024, "n_heads": 8, "n_kv_heads": 2, "multiple_of": 256}
SMALL: dict[str, Any] = {"dim": 128, "n_heads": 2, "n_kv_heads": 1, "multiple_of": 64}
SHAPES = {
    "odd": ODD | {"n_layers": 1, "vocab_size": 509},
    "wide": WIDE | {"n_layers": 1, "vocab_size": 2050},
    "small": SMALL | {"n_layers": 1, "vocab_size": 100},
}
ROWS = (1, 3, 8, 32, 200)


def plain_weight(name: str, linear: nn.Linear, scheme: str) -> Tensor:
    """What the quantized linear's codes and scales mean, fp32 on the CPU."""
    module = quantized(scheme)(name, linear)
    if isinstance(module, Int8Linear):
        return dequantize_int8(module.q, module.scale)
    assert isinstance(module, Int4Linear)
    return dequantize_int4(module.packed, module.scale, module.zero, module.n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_layers_are_the_plain_path(shape: str, scheme: str, dtype: torch.dtype) -> None:
    """Every linear of a layer and the output layer, for few and for many rows."""
    model = Transformer(ModelArgs(**SHAPES[shape], max_seq_len=16))
    model.load_state_dict(random_weights(**SHAPES[shape]))
    weights = {
        name: plain_weight(name, linear, scheme)
        for name, linear in model.to(dtype).named_modules()
        if isinstance(linear, nn.Linear)
    }
    assert len(weights) == 8
    model.to(DEVICE)
    optimize(model, scheme)
    # bf16: x and the result are rounded, and int4's zeros may be too.
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    with torch.inference_mode():
        for name, weight in weights.items():
            layer = model.get_submodule(name)
            for rows in ROWS:
                x = torch.randn(rows, 1, weight.shape[1]).to(dtype)
                found = layer(x.to(DEVICE)).float().cpu()
                wanted = x.float() @ weight.T
                assert found.shape == wanted.shape
                error = float((found - wanted).abs().max() / wanted.abs().max())
                assert error < tolerance, f"{name}, {rows} rows: {error}"


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_row_does_not_depend_on_the_others(scheme: str) -> None:
    """Up to the rounding of another order of sums."""
    model = Transformer(ModelArgs(**SHAPES["wide"], max_seq_len=16)).bfloat16().to(DEVICE)
    optimize(model, scheme)
    layer = model.get_submodule("layers.0.feed_forward.w1")
    x = torch.randn(32, 1, 1024, device=DEVICE).bfloat16()
    with torch.inference_mode():
        together = layer(x).float()
        alone = torch.cat([layer(x[i : i + 1]) for i in range(32)]).float()
    assert (together - alone).abs().max() < 0.02 * together.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("H", "K", "D"), [(8, 2, 64), (4, 4, 128), (6, 1, 32)])
def test_attention(H: int, K: int, D: int, dtype: torch.dtype) -> None:
    """Decoding at several positions, prompts, and parts of prompts after a cache."""
    args = ModelArgs(dim=H * D, n_layers=1, n_heads=H, n_kv_heads=K, vocab_size=8, max_seq_len=8)
    model = Transformer(args).to(DEVICE, dtype)
    optimize(model)
    core, plain = model.get_submodule("layers.0.attention.core"), DotProductAttention()
    S = 300
    cases: list[tuple[int, list[int]]] = [
        (1, [0, 5, 299]),  # T, the last position of each row
        (1, [255, 256, 31]),
        (7, [6, 6, 6]),
        (S, [S - 1] * 3),
        (33, [140, 32, 299]),
    ]
    for T, last in cases:
        B = len(last)
        xq = torch.randn(B, T, H, D).to(dtype)
        keys, values = (torch.randn(B, S, K, D).to(dtype) for _ in range(2))
        positions = torch.tensor(last).unsqueeze(1) + torch.arange(1 - T, 1)
        mask = (torch.arange(S) <= positions.unsqueeze(-1)).unsqueeze(1)
        wanted = plain(xq.float(), keys.float(), values.float(), mask)
        given = (t.to(DEVICE) for t in (xq, keys, values, mask, positions))
        with torch.inference_mode():
            found = core(*given).float().cpu()
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        assert (found - wanted).abs().max() < tolerance, (T, last)
        assert math.isfinite(float(found.sum()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_causal_attention_without_a_mask(dtype: torch.dtype) -> None:
    """A whole prompt at once, as the model calls it from position 0."""
    model = Transformer(ModelArgs(dim=256, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=8))
    optimize(model.to(DEVICE, dtype))
    core = model.get_submodule("layers.0.attention.core")
    for B, T in ((1, 1), (2, 70), (3, 257)):
        xq = torch.randn(B, T, 4, 64).to(dtype)
        keys, values = (torch.randn(B, T, 2, 64).to(dtype) for _ in range(2))
        wanted = DotProductAttention()(xq.float(), keys.float(), values.float(), None)
        positions = torch.arange(T, device=DEVICE).unsqueeze(0)
        with torch.inference_mode():
            found = core(xq.to(DEVICE), keys.to(DEVICE), values.to(DEVICE), None, positions)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        assert (found.float().cpu() - wanted).abs().max() < tolerance
