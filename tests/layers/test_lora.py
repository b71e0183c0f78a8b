"""Adapted linears. The oracle is peft around transformers' Llama."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llama import ModelArgs, Transformer
from llama.layers.lora import (
    TARGETS,
    LoRAConfig,
    LoRALinear,
    add_lora,
    initialize_lora,
    lora_modules,
    lora_part,
    lora_state,
    merged,
    set_dropout_key,
    without_adapter,
)
from llama.layers.optimize import optimize, quantize_model
from llama.layers.quantized_linear import QUANTIZED, BlockLinear, Int8Linear, weight_blocks
from tests.layers.peft_oracle import hf_name, loss_of, make_ours, make_peft, randomize, to_hf
from tests.models import random_weights

SHAPE: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
SHAPE |= {"vocab_size": 100, "multiple_of": 64, "max_seq_len": 32}
WIDE = SHAPE | {"dim": 96, "n_heads": 6, "n_kv_heads": 1, "n_layers": 1, "rope_theta": 10000.0}
TOKENS = torch.randint(100, (2, 15), generator=torch.Generator().manual_seed(0))
CONFIGS = [
    ("all", SHAPE, LoRAConfig(rank=4)),
    ("one KV head", WIDE, LoRAConfig(rank=3, alpha=5.0)),
    ("two targets", SHAPE, LoRAConfig(rank=8, targets=("wk", "w2"))),
    ("rslora", SHAPE, LoRAConfig(rank=4, rslora=True)),
    ("dora", SHAPE, LoRAConfig(rank=4, dora=True)),
    ("dora, one KV head", WIDE, LoRAConfig(rank=5, dora=True, rslora=True)),
]
cases = pytest.mark.parametrize(
    ("shape", "config"), [case[1:] for case in CONFIGS], ids=[case[0] for case in CONFIGS]
)


@cases
def test_loss_and_gradients_equal_those_of_peft(shape: dict[str, Any], config: LoRAConfig) -> None:
    ours = make_ours(shape, config)
    peft = make_peft(ours, config)
    found, wanted = loss_of(ours, TOKENS), peft(input_ids=TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    found.backward()
    wanted.backward()
    gradients = {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}
    trained = [(name, p) for name, p in ours.named_parameters() if p.grad is not None]
    assert {name for name, _ in trained} == set(lora_state(ours))
    assert (
        len(trained)
        == len(gradients)
        == len(config.targets) * shape["n_layers"] * (3 if config.dora else 2)
    )
    for name, parameter in trained:
        assert parameter.grad is not None
        gradient = to_hf(name, parameter.grad, ours.params)
        wanted = gradients[hf_name(name, set(gradients))]
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-4)


@cases
def test_merged_weights_equal_those_of_peft(shape: dict[str, Any], config: LoRAConfig) -> None:
    ours = make_ours(shape, config)
    peft = make_peft(ours, config)
    weights = {}
    for module in lora_modules(ours):
        base = module.base.weight
        assert isinstance(base, Tensor)
        whole = merged(base, module.lora_a, module.lora_b, config, module.lora_magnitude)
        weights[module.name] = whole
        layer = peft.get_submodule(
            hf_name(f"{module.name}.lora_a", set()).removesuffix(".lora_A.default.weight")
        )
        layer.merge()  # type: ignore[operator]
        wanted = layer.base_layer.weight  # type: ignore[union-attr]
        found = to_hf(f"{module.name}.weight", whole, ours.params)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert len(weights) == len(config.targets) * shape["n_layers"]
    plain = Transformer(ModelArgs(**shape))
    plain.load_state_dict(
        random_weights(**shape) | {f"{name}.weight": w.detach() for name, w in weights.items()}
    )
    torch.testing.assert_close(ours(TOKENS), plain(TOKENS), atol=1e-4, rtol=1e-4)


def make_model(
    dtype: torch.dtype, scheme: str | None, config: LoRAConfig | None, exact: bool = False
) -> Transformer:
    """A model as `Llama.build` makes it, whose adapter has just been initialized."""
    model = Transformer(ModelArgs(**SHAPE))
    model.load_state_dict(random_weights(**SHAPE))
    model.to(dtype).eval()
    quantize_model(model, scheme)
    if config is not None:
        add_lora(model, config)
        initialize_lora(model, seed=1)
    optimize(model, exact)
    return model


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_initial_adapter_changes_no_bit(
    dtype: torch.dtype, scheme: str | None, exact: bool
) -> None:
    """In training and inference, for many and few rows; but it does once B is not 0."""
    base = make_model(dtype, scheme, None, exact)
    for dora in (False, True):
        adapted = make_model(dtype, scheme, LoRAConfig(rank=4, dora=dora), exact)
        adapted.requires_grad_(requires_grad=False)
        for _, weight in trained(adapted):
            weight.requires_grad_()
        if exact:  # as in training; the kernels of a fast model have no gradients
            assert torch.equal(adapted(TOKENS), base(TOKENS))
        with torch.inference_mode():
            for tokens in (TOKENS, TOKENS[:, :1]):
                assert torch.equal(adapted(tokens, 0), base(tokens, 0))
        randomize(adapted)
        adapted.eval()
        with torch.inference_mode():
            found = adapted(TOKENS, 0)
        assert not torch.equal(found, base(TOKENS, 0))
        with without_adapter(adapted), torch.inference_mode():
            assert torch.equal(adapted(TOKENS, 0), base(TOKENS, 0))
        wanted = adapted(TOKENS)  # as in training, with gradients
        torch.testing.assert_close(
            found, wanted, atol=0.2 if dtype != torch.float32 else 1e-4, rtol=0
        )


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dora", [False, True])
def test_gradients_on_a_quantized_base_are_those_on_its_dequantized_weights(
    scheme: str, dora: bool
) -> None:
    config = LoRAConfig(rank=4, dora=dora)
    quantized, plain = (
        make_model(torch.float32, scheme, config),
        make_model(torch.float32, None, config),
    )
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, QUANTIZED):
                plain.get_submodule(name).weight.copy_(torch.cat(list(weight_blocks(module))))  # type: ignore[operator]
    for model in (quantized, plain):
        randomize(model)
        loss_of(model, TOKENS).backward()
    for (name, found), (_, wanted) in zip(trained(quantized), trained(plain), strict=True):
        assert found.grad is not None and wanted.grad is not None, name
        torch.testing.assert_close(found.grad, wanted.grad, atol=1e-5, rtol=1e-3)


def trained(model: Transformer) -> list[tuple[str, torch.nn.Parameter]]:
    names = lora_state(model)
    return [(name, weight) for name, weight in model.named_parameters() if name in names]


def test_bf16_gradients_are_close_to_fp32() -> None:
    """A base in bf16, with and without autocast, and one in fp32 under autocast."""
    config = LoRAConfig(rank=4)
    wanted = make_ours(SHAPE, config)
    loss_of(wanted, TOKENS).backward()
    for base, autocast in (("bf16", False), ("bf16", True), ("fp32", True)):
        model = make_ours(SHAPE, config)
        if base == "bf16":
            for weight in model.parameters():
                weight.data = weight.data if weight.requires_grad else weight.data.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, TOKENS)
        loss.backward()
        for (name, found), (_, exact) in zip(trained(model), trained(wanted), strict=True):
            assert found.grad is not None and exact.grad is not None, name
            assert found.grad.dtype == torch.float32
            error = (found.grad - exact.grad).norm() / exact.grad.norm()
            assert error < 0.05, (name, base, autocast, error)


def test_dropout_follows_from_the_key() -> None:
    linear = LoRALinear(torch.nn.Linear(1000, 2, bias=False), LoRAConfig(2, dropout=0.3), "wq")
    x = torch.ones(50, 1000)
    with pytest.raises(ValueError, match="set_dropout_key"):
        linear(x)

    def mask(*key: int) -> Tensor:
        set_dropout_key(linear, *key)
        return linear._kept(x)

    first = mask(1, 2, 3)
    assert abs(first.float().mean() - 0.7) < 0.01
    torch.manual_seed(0)
    assert torch.equal(first, mask(1, 2, 3))
    linear.name = "wk"
    others = [mask(1, 2, 3), mask(0, 2, 3), mask(1, 3, 3), mask(1, 2, 4)]
    for other in others:
        assert abs((first == other).float().mean() - (0.7**2 + 0.3**2)) < 0.01  # independent


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("kind", ["frozen", "trained", "int8", "int4"])
def test_dropout_scales_what_it_keeps_and_only_in_training(kind: str) -> None:
    """The outputs, and the gradients of the inputs and of A and B; autograd is the oracle."""
    plain = torch.nn.Linear(64, 32, bias=False).requires_grad_(kind == "trained")
    quantized = {"int8": Int8Linear, "int4": BlockLinear}
    base = quantized[kind](plain.weight) if kind in quantized else plain
    weight = torch.cat(list(weight_blocks(base)))
    linear = LoRALinear(base, LoRAConfig(4, dropout=0.25), "wq")
    randomize(linear)
    x, grad, scale = torch.randn(2, 6, 64, requires_grad=True), torch.randn(2, 6, 32), 4.0
    set_dropout_key(linear, 1, 2, 3)
    for kept in (linear._kept(x) / 0.75, torch.ones(())):
        inputs = (x, linear.lora_a, linear.lora_b)
        wanted = x @ weight.T + scale * ((kept * x) @ linear.lora_a.T @ linear.lora_b.T)
        found = linear(x)
        torch.testing.assert_close(found, wanted)
        pairs = [torch.autograd.grad(y, inputs, grad) for y in (found, wanted)]
        for pair in zip(*pairs, strict=True):
            torch.testing.assert_close(*pair)
        linear.eval()


def test_recomputation_repeats_dropout() -> None:
    found = []
    for again in (False, True):
        model = make_ours(SHAPE, LoRAConfig(rank=4, dropout=0.5))
        set_dropout_key(model, 1, 2, 3)
        h = model.embed(TOKENS)
        freqs_cis, *_ = model.locate((2, 15), None, None)
        for layer in model.layers:
            if again:
                h = checkpoint(layer, h, freqs_cis, use_reentrant=False, preserve_rng_state=False)
            else:
                h = layer(h, freqs_cis)
        h.square().sum().backward()
        found.append([weight.grad for _, weight in trained(model)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_initial_weights_follow_from_the_seed_and_the_name() -> None:
    some = make_model(torch.float32, None, LoRAConfig(rank=4, targets=("wk",)))
    every = make_model(torch.float32, None, LoRAConfig(rank=4))
    states = lora_state(some), lora_state(every)
    assert set(states[0]) == {f"layers.{i}.attention.wk.lora_{m}" for i in (0, 1) for m in "ab"}
    assert all(torch.equal(weight, states[1][name]) for name, weight in states[0].items())
    a = states[1]["layers.0.feed_forward.w2.lora_a"]
    assert a.abs().max() <= a.shape[1] ** -0.5 < 1.1 * a.abs().max()
    assert not torch.equal(*(states[1][f"layers.{i}.feed_forward.w2.lora_a"] for i in (0, 1)))


def test_ranks_parts_of_an_adapter_are_those_of_the_weights() -> None:
    args = ModelArgs(**SHAPE)
    a, b = torch.randn(3, 64), torch.randn(64, 3)
    wq, wo = "layers.1.attention.wq", "layers.1.attention.wo"
    assert torch.equal(lora_part(f"{wq}.lora_a", a, args, 1, 2), a)
    assert torch.equal(lora_part(f"{wq}.lora_b", b, args, 1, 2), b[32:])
    assert torch.equal(lora_part(f"{wq}.lora_magnitude", b[:, 0], args, 1, 2), b[32:, 0])
    assert torch.equal(lora_part(f"{wo}.lora_a", a, args, 1, 2), a[:, 32:])
    assert torch.equal(lora_part(f"{wo}.lora_b", b, args, 1, 2), b)
    assert torch.equal(lora_part(f"{wo}.lora_magnitude", b[:, 0], args, 1, 2), b[:, 0])
    assert lora_part(f"{wq}.lora_b", b, args, 0, 1) is b


def test_wrong_use_is_refused() -> None:
    model = make_model(torch.float32, None, LoRAConfig(targets=("wq",)))
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(model, LoRAConfig())
    with pytest.raises(ValueError, match="before an adapter is added"):
        quantize_model(model, "int8")
    with pytest.raises(ValueError, match=r"no linears \['w1'\]"):
        add_lora(
            torch.nn.ModuleDict({"wq": torch.nn.Linear(2, 2)}), LoRAConfig(targets=("wq", "w1"))
        )
    wrong: dict[str, Any]
    for wrong in ({"rank": 0}, {"alpha": 0}, {"alpha": float("nan")}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LoRAConfig(**wrong)
    with pytest.raises(ValueError, match=r"\['lm_head'\]"):
        LoRAConfig(targets=("wq", "lm_head"))
    assert LoRAConfig().targets == TARGETS
