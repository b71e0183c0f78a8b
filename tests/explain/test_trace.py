"""Every number of a trace, against arithmetic, the model's own forward, and the engine."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import llama.model
from llama import Llama, ModelArgs, Sampling, Transformer
from llama.engine.sampling import sample
from llama.explain import hooks
from llama.explain.hooks import attention_weights
from llama.explain.trace import Trace
from llama.model import DotProductAttention
from tests.explain import plain
from tests.models import TINY

IDS = [1, 5, 300, 7, 42, 300, 8, 99]
PARAMS: dict[str, Any] = TINY | {"vocab_size": 512}


def build(folder: Path, tokenizer: Path, **options: Any) -> Llama:
    settings = {"device": "cpu", "dtype": "fp32"} | options
    return Llama.build(folder, tokenizer, 64, 2, **settings)


@pytest.fixture(scope="module")
def tiny(folder: Path, byte_tokenizer_path: Path) -> Iterator[Llama]:
    with build(folder, byte_tokenizer_path) as llama:
        yield llama


@pytest.fixture(scope="module")
def trace(tiny: Llama) -> Trace:
    return tiny.explain(IDS, temperature=0.7, top_k=30, top_p=0.8, min_p=0.001)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> plain.Computed:
    return plain.compute(torch.load(folder / "consolidated.00.pth"), PARAMS, IDS)


def near(found: Tensor, expected: Tensor, atol: float = 2e-4) -> None:
    torch.testing.assert_close(found, expected.float(), atol=atol, rtol=1e-4)


def test_tensors_equal_arithmetic(trace: Trace, oracle: plain.Computed) -> None:
    near(trace.residual, torch.stack(oracle.residual))
    near(trace.attention, torch.stack(oracle.attention), 1e-5)
    near(trace.keys, torch.stack(oracle.keys))
    near(trace.values, torch.stack(oracle.values))
    near(trace.logits, oracle.logits)
    near(trace.embedded, oracle.residual[0])


def test_attention_sums_to_one_and_reads_the_values(trace: Trace) -> None:
    assert torch.allclose(trace.attention.sum(-1), torch.ones(2, 4, 8), atol=1e-6)
    assert trace.attention.triu(1).abs().max() == 0
    xq = torch.randn(1, 8, 4, 16)
    keys, values = trace.keys[:1], trace.values[:1]
    expected = DotProductAttention()(xq, keys, values, None)
    weights = attention_weights(DotProductAttention(), xq, keys, None)
    mine = torch.stack([weights[0, :, h] @ values[0, :, h // 2] for h in range(4)], 1)
    near(mine, expected[0], 1e-5)


def test_logits_are_those_of_the_loaded_model(tiny: Llama, trace: Trace) -> None:
    with torch.no_grad():
        near(trace.logits, tiny.model(torch.tensor([IDS]))[0])


def test_the_lens(trace: Trace, oracle: plain.Computed, folder: Path) -> None:
    """Of each state, by arithmetic; the last is the softmax of the model's own logits."""
    weights = torch.load(folder / "consolidated.00.pth")
    scale, output = weights["norm.weight"].double(), weights["output.weight"].double()
    for i, state in enumerate(oracle.residual):
        probs = torch.softmax(plain.norm(state, scale, 1e-5) @ output.T, -1)
        near(trace.lens_probs[i], probs.topk(5).values, 1e-5)
        near(trace.lens_probs[i], probs.gather(-1, trace.lens_ids[i]), 1e-5)
    last = torch.softmax(trace.logits, -1).topk(5)
    near(trace.lens_probs[-1], last.values, 1e-6)
    assert torch.equal(trace.lens_ids[-1], last.indices)


def test_the_lens_of_many_tokens(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than have their logits at once."""
    monkeypatch.setattr(hooks, "LENS_CHUNK", 3)
    trace = tiny.explain(IDS)
    last = torch.softmax(trace.logits, -1).topk(5)
    near(trace.lens_probs[-1], last.values, 1e-6)
    assert torch.equal(trace.lens_ids[-1], last.indices) and trace.lens_ids.shape == (3, 8, 5)


def test_logprobs_are_those_of_score(tiny: Llama) -> None:
    text = "a text to score"
    [scored] = tiny.score([text])
    trace = tiny.explain(text)
    assert math.isnan(trace.logprobs[0]) and scored["logprobs"][0] is None
    assert trace.logprobs[1:].tolist() == pytest.approx(scored["logprobs"][1:], abs=1e-4)
    assert trace.surprise[1:].tolist() == pytest.approx(
        [-p / math.log(2) for p in scored["logprobs"][1:] if p is not None], abs=1e-3
    )
    assert b"".join(trace.pieces[1:]) == text.encode() and trace.special[:2] == [True, False]


def test_parameters_bytes_and_operations(tiny: Llama, trace: Trace, folder: Path) -> None:
    weights = torch.load(folder / "consolidated.00.pth")
    assert sum(s.parameters for s in trace.stages) == sum(w.numel() for w in weights.values())
    assert sum(s.bytes for s in trace.stages) == sum(4 * w.numel() for w in weights.values())
    by_name = {s.module: s for s in trace.stages}
    assert by_name["Attention.wk"].parameters == 2 * weights["layers.0.attention.wk.weight"].numel()
    model = Transformer(ModelArgs(**PARAMS))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.tensor([IDS]))
    assert sum(s.operations for s in trace.stages) == counter.get_total_flops()


def test_stages_are_in_order_with_the_shapes_of_the_model(trace: Trace) -> None:
    shapes = [s.shape for s in trace.stages]
    D = (8, 64)
    width = ModelArgs(**PARAMS).hidden_dim
    heads, kv_heads = (8, 4, 16), (8, 2, 16)
    layer = [D, D, (8, 32), (8, 32), heads, kv_heads, heads, D, D, *[(8, width)] * 3, D]
    assert shapes == [(8,), D, *layer, D, (8, 512)]
    assert len({s.name for s in trace.stages}) == len(trace.stages)
    for stage in trace.stages:  # each names something of model.py
        kind, _, member = stage.module.partition(".")
        found = getattr(llama.model, kind)
        if member:
            args = ModelArgs(**PARAMS)
            made = found(0, args) if kind == "TransformerBlock" else found(args)
            assert hasattr(made, member)


@pytest.mark.parametrize("scaled", [False, True])
def test_angles(
    tiny_checkpoint: Callable[..., Path], byte_tokenizer_path: Path, scaled: bool
) -> None:
    folder = tiny_checkpoint(vocab_size=512, n_layers=1, use_scaled_rope=scaled)
    with build(folder, byte_tokenizer_path) as llama:
        trace = llama.explain(IDS)
    for i in range(8):
        plain_turn = 500000.0 ** (-2 * i / 16)
        expected = scaled_turn(plain_turn) if scaled else plain_turn
        assert float(trace.unscaled_frequencies[i]) == pytest.approx(plain_turn, rel=1e-5)
        assert float(trace.frequencies[i]) == pytest.approx(expected, rel=1e-5)
        for m in range(len(IDS)):
            assert complex(trace.rotations[m, i]) == pytest.approx(
                complex(math.cos(m * expected), math.sin(m * expected)), abs=1e-5
            )
            assert complex(trace.unscaled_rotations[m, i]) == pytest.approx(
                complex(math.cos(m * plain_turn), math.sin(m * plain_turn)), abs=1e-5
            )


def scaled_turn(turn: float) -> float:
    """Llama 3.1's scaling by 8, as its paper's code has it."""
    wavelength = 2 * math.pi / turn
    if wavelength < 8192 / 4:
        return turn
    if wavelength > 8192:
        return turn / 8
    smooth = (8192 / wavelength - 1) / (4 - 1)
    return (1 - smooth) * turn / 8 + smooth * turn


def test_the_next_token_is_drawn_from_what_is_left(tiny: Llama, trace: Trace) -> None:
    """Against a full sort, and against what the engine's `sample` draws."""
    logits = trace.logits[-1].double()
    raw, tempered = torch.softmax(logits, -1), torch.softmax(logits / 0.7, -1)
    near(trace.next.raw, raw, 1e-6)
    near(trace.next.tempered, tempered, 1e-6)
    order = tempered.argsort(descending=True).tolist()
    kept = [i for i in order[:30] if tempered[i] >= 0.001 * tempered[order[0]]]
    mass = sum(float(tempered[i]) for i in kept)
    assert set(trace.next.limited.nonzero().flatten().tolist()) == set(kept)
    nucleus, total = [], 0.0
    for i in kept:
        if total > 0.8:
            break
        nucleus.append(i)
        total += float(tempered[i]) / mass
    assert trace.next.final.nonzero().flatten().tolist() == sorted(nucleus)
    shares = torch.tensor([float(tempered[i]) / mass / total for i in nucleus])
    near(trace.next.final[nucleus], shares, 1e-5)
    rows = trace.logits[-1].expand(4000, -1)
    drawn = sample(rows, Sampling(0.7, 0.8, 30, 0.001)).bincount(minlength=512) / 4000
    assert set(drawn.nonzero().flatten().tolist()) <= set(nucleus)
    assert (drawn - trace.next.final).abs().max() < 0.05


def test_greedy_and_unused_ids(tiny: Llama) -> None:
    trace = tiny.explain(IDS, temperature=0)
    best = int(trace.logits[-1].argmax())
    assert trace.next.final.nonzero().flatten().tolist() == [best] and trace.next.final.sum() == 1
    tiny.model.unused = torch.tensor([best])
    try:
        assert tiny.explain(IDS).next.raw[best] == 0
    finally:
        tiny.model.unused = None


def test_the_cache(tiny: Llama, trace: Trace) -> None:
    each = sum(c.k[0, 0].nbytes + c.v[0, 0].nbytes for c in tiny.engine.cache)
    assert trace.cache_bytes == each and trace.ungrouped_cache_bytes == 2 * each
    cache = tiny.model.new_cache(1, 16)
    with torch.no_grad():
        tiny.model.hidden(torch.tensor([IDS]), 0, cache)
    near(trace.keys, torch.stack([c.k[0, :8] for c in cache]))
    near(trace.values, torch.stack([c.v[0, :8] for c in cache]))


def test_the_live_model_is_not_changed(tiny: Llama) -> None:
    before = {name: (type(m), id(m)) for name, m in tiny.model.named_modules()}
    weights = {name: (w.data_ptr(), w.sum().item()) for name, w in tiny.model.named_parameters()}
    caches = [(c.k.clone(), c.v.clone()) for c in tiny.engine.cache]
    tiny.explain(IDS)
    assert before == {name: (type(m), id(m)) for name, m in tiny.model.named_modules()}
    now = {name: (w.data_ptr(), w.sum().item()) for name, w in tiny.model.named_parameters()}
    assert weights == now and tiny.model.cache is None
    for module in tiny.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    for cache, (k, v) in zip(tiny.engine.cache, caches, strict=True):
        assert torch.equal(cache.k, k) and torch.equal(cache.v, v)


def test_while_another_thread_generates(tiny: Llama, trace: Trace) -> None:
    alone = tiny.generate([IDS[:3]], 50, temperature=0)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(generate_often(tiny)))
    thread.start()
    for _ in range(5):
        again = tiny.explain(IDS)
        near(again.logits, trace.logits, 1e-5)
        near(again.attention, trace.attention, 1e-6)
    thread.join()
    assert found == [[alone] * 10]


def generate_often(llama: Llama) -> list[Any]:
    return [llama.generate([IDS[:3]], 50, temperature=0) for _ in range(10)]
