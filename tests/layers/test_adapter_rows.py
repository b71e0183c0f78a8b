"""Rows of a batch with different adapters, against models with each adapter merged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llama.layers.adapter_rows import LowRank, MultiLoRALinear, add_adapters, selected
from llama.layers.lora import LoRAConfig
from llama.layers.optimize import FAST, REFERENCE
from llama.layers.quantized_linear import QUANTIZED, BlockLinear, Int8Linear, quantized
from llama.layers.replace import replace_modules
from llama.model import ModelArgs, Transformer
from tests.adapters import Adapter, merged_model, random_adapter
from tests.models import random_weights

SHAPE: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
SHAPE |= {"vocab_size": 50, "multiple_of": 64, "max_seq_len": 32, "max_batch_size": 4}
ARGS = ModelArgs(**SHAPE)
WEIGHTS = random_weights(**SHAPE)
ADAPTERS: dict[str, Adapter] = {
    "all": random_adapter(1, ARGS, rank=4, alpha=8.0),
    "v1.0 of q, o": random_adapter(2, ARGS, rank=2, alpha=3.0, rslora=True, targets=("wq", "wo")),
    "dora": random_adapter(3, ARGS, rank=3, alpha=4.0, dora=True, targets=("wk", "wo", "w1", "w2")),
}
TOKENS = torch.arange(4 * 7).view(4, 7) % 50


def base() -> Transformer:
    return merged_model(ARGS, WEIGHTS, None)


def wants(weights: dict[str, torch.Tensor]) -> dict[str | None, torch.Tensor]:
    """Logits of TOKENS by the model with each adapter merged into these weights."""
    wanted: dict[str | None, torch.Tensor] = {}
    with torch.no_grad():
        for name in (None, *ADAPTERS):
            adapter = None if name is None else ADAPTERS[name]
            wanted[name] = merged_model(ARGS, weights, adapter)(TOKENS)
    return wanted


@pytest.mark.parametrize("table", [{}, REFERENCE, FAST], ids=["plain", "exact", "fast"])
def test_each_row_has_its_own_adapter(table: Any) -> None:
    model, wanted = base(), wants(WEIGHTS)
    add_adapters(model, ADAPTERS)
    replace_modules(model, table)
    batches: tuple[tuple[str | None, ...], ...] = (
        ("all", None, "dora", "v1.0 of q, o"),
        ("dora", "all", "dora", "all"),
        ("all",) * 4,
        (None,) * 4,
    )
    for rows in batches:
        with torch.no_grad(), selected(model, rows):
            logits = model(TOKENS)
        for i, name in enumerate(rows):
            torch.testing.assert_close(logits[i], wanted[name][i], rtol=0, atol=2e-4)
    assert not torch.allclose(wanted["all"], wanted[None], atol=0.1)


def test_rows_without_an_adapter_are_the_base_bitwise() -> None:
    plain, model = base(), base()
    add_adapters(model, ADAPTERS)
    with torch.no_grad(), selected(model, ["all", None, "dora", None]):
        mixed = model(TOKENS)
    with torch.no_grad():
        want, alone = plain(TOKENS), model(TOKENS)
    assert torch.equal(mixed[1], want[1]) and torch.equal(mixed[3], want[3])
    assert torch.equal(alone, want)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("scheme, kind", [("int8", Int8Linear), ("int4", BlockLinear)])
def test_quantized_bases(scheme: str, kind: type) -> None:
    """Against the dequantized weights, so that only the adapters are compared."""
    model = base()
    replace_modules(model, {torch.nn.Linear: quantized(scheme)})
    dequantized = dict(WEIGHTS)
    for name in WEIGHTS:
        linear = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(linear, QUANTIZED):  # each column by a unit vector
            K = WEIGHTS[name].shape[1]
            dequantized[name] = linear(torch.eye(K)).T.contiguous()
    add_adapters(model, ADAPTERS)
    wanted = wants(dequantized)
    layer = model.layers[0].get_submodule("attention.wq")
    assert isinstance(layer, MultiLoRALinear) and type(layer.base) is kind
    rows: list[str | None] = ["all", None, "dora", "v1.0 of q, o"]
    with torch.no_grad(), selected(model, rows):
        logits = model(TOKENS)
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i], wanted[row][i], rtol=0, atol=5e-4)


def test_parts_have_the_models_dtype() -> None:
    model = base().to(torch.bfloat16)
    add_adapters(model, ADAPTERS)
    parts = [m for m in model.modules() if isinstance(m, LowRank)]
    assert {x.dtype for m in parts for x in (m.a, m.b)} == {torch.bfloat16}


def test_what_does_not_fit_is_refused() -> None:
    config, tensors = ADAPTERS["all"]
    name = "layers.1.feed_forward.w2.lora_a"
    cases = [
        ({}, "at least one adapter"),
        ({"": ADAPTERS["all"]}, "each with a name"),
        ({"x": (config, {**tensors, name: tensors[name][:, 1:]})}, rf"{name} is \(4, 191\)"),
        ({"x": (config, {k: v for k, v in tensors.items() if k != name})}, "w2.lora_a is missing"),
        ({"x": (LoRAConfig(rank=5), tensors)}, r"needs \(5, 64\)"),
        ({"x": (config, {"layers.7.attention.wq.lora_a": tensors[name]})}, "no linear layers.7"),
        ({"x": (config, {"output.lora_a": tensors[name]})}, "no linear output"),
    ]
    for adapters, message in cases:
        model = base()
        with pytest.raises(ValueError, match=message):
            add_adapters(model, adapters)
        assert not any(isinstance(m, MultiLoRALinear) for m in model.modules())
    chosen = add_adapters(model, ADAPTERS)
    with pytest.raises(ValueError, match="already"):
        add_adapters(model, ADAPTERS)
    with pytest.raises(ValueError, match="no adapter 'none'; use one of all, v1"):
        chosen.select(["none"])
    chosen.select(["all", None])
    with pytest.raises(ValueError, match="selected for 2 rows, and the batch has 4"):
        model(TOKENS)
