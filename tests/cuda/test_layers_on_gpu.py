"""Replaced layers on a GPU against the plain path in fp32."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from llama import ModelArgs, Transformer
from llama.layers.optimize import optimize, quantize_model
from llama.layers.quantization import dequantize_int4, dequantize_int8
from llama.layers.quantized_linear import Int4Linear, Int8Linear, quantized
from llama.layers.replace import replace_modules
from llama.model import DotProductAttention, TransformerBlock
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


def plain_linear(scheme: str, name: str, linear: nn.Linear) -> nn.Module:
    """A linear in fp32 with what the quantized linear's codes and scales mean."""
    module = quantized(scheme)(name, linear)
    if isinstance(module, Int8Linear):
        weight = dequantize_int8(module.q, module.scale)
    else:
        assert isinstance(module, Int4Linear)
        weight = dequantize_int4(module.packed, module.scale, module.zero, module.n)
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(weight)
    return plain


def pair(
    shape: str, scheme: str, dtype: torch.dtype, device: torch.device = DEVICE
) -> tuple[Transformer, Transformer]:
    """A quantized model on the GPU, and a plain one in fp32 on the CPU with the same weights."""
    models = []
    for _ in range(2):
        model = Transformer(ModelArgs(**SHAPES[shape], max_seq_len=16))
        model.load_state_dict(random_weights(**SHAPES[shape]))
        models.append(model.to(dtype).eval())
    found, wanted = models
    replace_modules(wanted, {nn.Linear: partial(plain_linear, scheme)})
    found.to(device)
    quantize_model(found, scheme)
    optimize(found)
    return found, wanted.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_layers_are_the_plain_path(shape: str, scheme: str, dtype: torch.dtype) -> None:
    """Queries, keys and values; wo; the feed-forward; the output layer; for few and many rows."""
    found, wanted = pair(shape, scheme, dtype)
    dim, freqs = found.params.dim, found.freqs_cis[3:4]
    # bf16: x, the result, and in the feed-forward what is between its linears are rounded.
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    with torch.inference_mode():
        for rows in ROWS:
            x = torch.randn(rows, 1, dim).to(dtype)
            results = []
            for model, given in ((found, x.to(DEVICE)), (wanted, x.float())):
                block = model.layers[0]
                assert isinstance(block, TransformerBlock)
                heads = block.attention.heads(given, freqs.to(given.device))
                last = (block.attention.wo(given), block.feed_forward(given), model.output(given))
                results.append([*heads, *last])
            for i, (y, z) in enumerate(zip(*results, strict=True)):
                assert y.shape == z.shape and y.dtype == dtype
                error = float((y.float().cpu() - z).abs().max() / z.abs().max())
                assert error < tolerance, f"result {i}, {rows} rows: {error}"


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_row_does_not_depend_on_the_others(scheme: str) -> None:
    """Up to the rounding of another order of sums."""
    model, _ = pair("wide", scheme, torch.bfloat16)
    layer = model.get_submodule("layers.0.feed_forward")
    x = torch.randn(32, 1, 1024, device=DEVICE).bfloat16()
    with torch.inference_mode():
        together = layer(x).float()
        alone = torch.cat([layer(x[i : i + 1]) for i in range(32)]).float()
    assert (together - alone).abs().max() < 0.02 * together.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("H", "K", "D"), [(8, 2, 64), (4, 4, 128), (6, 1, 32)])
def test_attention(H: int, K: int, D: int, dtype: torch.dtype) -> None:
    """Decoding at several positions, prompts, and parts of prompts after a cache."""
    S = 300
    args = ModelArgs(dim=H * D, n_layers=1, n_heads=H, n_kv_heads=K, vocab_size=8, max_seq_len=S)
    model = Transformer(args).to(DEVICE, dtype)
    optimize(model)
    core, plain = model.get_submodule("layers.0.attention.core"), DotProductAttention()
    cache, row = model.new_cache(5, S), 1
    for tensor in (cache[0].k, cache[0].v):
        tensor.copy_(torch.randn(tensor.shape))
    cases: list[tuple[int, int | list[int]]] = [  # T, and where each row's new positions begin
        (1, [0, 5, 299]),
        (1, [255, 256, 31]),
        (7, [0, 0, 0]),
        (33, [108, 0, 267]),
        (257, 0),
        (20, 40),
        (1, 77),
    ]
    for T, begins in cases:
        B = len(begins) if isinstance(begins, list) else 2
        start = torch.tensor(begins, device=DEVICE) if isinstance(begins, list) else begins
        length = max(begins) + T if isinstance(begins, list) else begins + T
        _, mask, at = model.locate((B, T), start, cache, length, row)
        xq = torch.randn(B, T, H, D).to(dtype)
        keys, values = (t[row : row + B, :length] for t in (cache[0].k, cache[0].v))
        with torch.inference_mode():
            found = core(xq.to(DEVICE), keys, values, mask, at).float().cpu()
        mask = None if mask is None else mask.cpu()
        wanted = plain(xq.float(), keys.float().cpu(), values.float().cpu(), mask)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        assert (found - wanted).abs().max() < tolerance, (T, begins)
