"""A step from ids to ids equals the plain step: model, logits, then `sample` for each row."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from llama.engine.compiled_step import CompiledStep
from llama.engine.drawing_step import Row, draw_rows
from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.engine.sampling import Sampling, sample, sample_rows, uniform_of
from llama.layers.optimize import optimize
from llama.model import KVCache, ModelArgs, Transformer, TransformerBlock
from tests.engine.test_steering import Cycle

SETTINGS = [
    Sampling(0.0),
    Sampling(0.7, 0.9),
    Sampling(1.3, 1.0),
    Sampling(0.9, 0.5, top_k=40),
    Sampling(1.0, 0.95, min_p=0.1),
    Sampling(0.6, 0.0),
    Sampling(1.5, 0.99, top_k=3, min_p=0.01),
]


EXTREME = [Sampling(1e39), Sampling(1e308, 0.5, top_k=10**400), Sampling(1e-5, 0.9)]


@torch.inference_mode()
def test_extreme_settings() -> None:
    """They draw what their limits draw, and never an id without a token."""
    model, step, cache = model_and_step()
    step.unused = torch.arange(10, 50)
    rows = [Row(7 + i, 299, how, torch.Generator().manual_seed(i)) for i, how in enumerate(EXTREME)]
    found = draw_rows(step, rows)
    assert all(drawn.finite and drawn.token < 10 for drawn in found)
    tokens, starts = torch.tensor([[7], [8], [9]]), torch.tensor([299] * 3)
    logits = model.logits(model.hidden(tokens, starts, cache)).squeeze(1)
    logits[:, 10:] = -math.inf
    for i, how in enumerate(EXTREME):
        generator = torch.Generator().manual_seed(i)
        assert found[i].token == int(sample(logits[i : i + 1], how, [generator]))


def columns(settings: list[Sampling]) -> list[torch.Tensor]:
    rows = [[how.temperature, how.top_p, how.top_k, how.min_p] for how in settings]
    return list(torch.tensor(rows).unbind(1))


@pytest.mark.parametrize("trial", range(4))
def test_rows_with_their_own_generators(trial: int) -> None:
    """Each row alone, by the plain sampler, gets the same id."""
    logits = 3 * torch.randn(7, 5000, generator=torch.Generator().manual_seed(trial))
    expected = []
    for i, how in enumerate(SETTINGS):
        generator = torch.Generator().manual_seed(trial + 9 * i)
        expected += sample(logits[i : i + 1], how, [generator]).tolist()
    uniform = [uniform_of(torch.Generator().manual_seed(trial + 9 * i)) for i in range(7)]
    found = sample_rows(logits, columns(SETTINGS), torch.tensor(uniform), False)
    assert found.tolist() == expected


@pytest.mark.parametrize("how", SETTINGS[1:])
def test_rows_of_the_global_generator(how: Sampling) -> None:
    """As torch.multinomial, which `sample` calls: the reference's ids for a seed."""
    logits = 3 * torch.randn(7, 5000, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    expected = sample(logits, how)
    torch.manual_seed(5)
    assert torch.equal(sample_rows(logits, columns([how] * 7), None, True), expected)


def test_rows_of_both_kinds() -> None:
    """Rows with a generator are not changed by rows without, and greedy rows by neither."""
    logits = 3 * torch.randn(3, 5000, generator=torch.Generator().manual_seed(2))
    settings = [Sampling(0.0), Sampling(0.8, 0.9), Sampling(0.8, 0.9)]
    uniform = torch.tensor([-1.0, 0.3, -1.0])
    alone = sample_rows(logits[1:2], columns(settings[1:2]), uniform[1:2], False)
    drawn = [sample_rows(logits, columns(settings), uniform, True) for _ in range(20)]
    assert {int(ids[0]) for ids in drawn} == {int(logits[0].argmax())}
    assert {int(ids[1]) for ids in drawn} == {int(alone)}
    assert len({int(ids[2]) for ids in drawn}) > 1


def model_and_step() -> tuple[Transformer, CompiledStep, list[KVCache]]:
    torch.manual_seed(0)
    args = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=50, max_seq_len=600)
    model = Transformer(args).requires_grad_(False)
    optimize(model)  # whose rotation takes real numbers
    cache = model.new_cache(3, 600)
    step = CompiledStep(model, cache)
    # Neither compiled nor a graph: what they repeat is the same.
    step.block, step.graphed = TransformerBlock.forward, False
    model.hidden(torch.randint(0, 50, (3, 300)), 0, cache)
    return model, step, cache


@torch.inference_mode()
def test_ids_and_log_probabilities() -> None:
    model, step, cache = model_and_step()
    rows = [
        Row(7, 299, Sampling(0.0), None),
        Row(8, 20, Sampling(0.9, 0.8), torch.Generator().manual_seed(3)),
        Row(9, 130, Sampling(0.0), torch.Generator().manual_seed(4)),
    ]
    tokens, starts = torch.tensor([[7], [8], [9]]), torch.tensor([299, 20, 130])
    logits = model.logits(model.hidden(tokens, starts, cache)).squeeze(1)
    second = sample(logits[1:2], rows[1].sampling, [torch.Generator().manual_seed(3)])
    expected = [int(logits[0].argmax()), int(second), int(logits[2].argmax())]
    found = draw_rows(step, rows)
    assert [drawn.token for drawn in found] == expected
    chosen = torch.log_softmax(logits, -1)[torch.arange(3), torch.tensor(expected)]
    torch.testing.assert_close(torch.tensor([drawn.logprob for drawn in found]), chosen)
    # A greedy row draws nothing from its generator.
    assert uniform_of(rows[2].generator) == uniform_of(torch.Generator().manual_seed(4))  # type: ignore[arg-type]


@torch.inference_mode()
def test_a_row_that_is_not_a_number_harms_no_other() -> None:
    model, step, _ = model_and_step()
    good = Row(7, 299, Sampling(0.0), None)
    [alone] = draw_rows(step, [good])
    model.tok_embeddings.weight[8] = math.nan
    found = draw_rows(step, [good, Row(8, 20, Sampling(0.0), None)])
    assert found[0] == pytest.approx(alone) and found[0].finite and not found[1].finite


@torch.inference_mode()
def test_ids_without_a_token_are_not_drawn() -> None:
    """Log-probabilities are of all ids, as in the plain path."""
    model, step, cache = model_and_step()
    row = Row(7, 299, Sampling(0.0), None)
    logits = model.logits(model.hidden(torch.tensor([[7]]), torch.tensor([299]), cache)).flatten()
    best, second = logits.topk(2).indices.tolist()
    step.unused = torch.tensor([best])
    [drawn] = draw_rows(step, [row])
    assert drawn.token == second
    assert drawn.logprob == pytest.approx(float(logits.log_softmax(-1)[second]), abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"sampling": Sampling(0.0, frequency_penalty=1.5)},
        {"logit_bias": {7: 9.0}},
        {"top_logprobs": 3},
        {"grammar": Cycle(5)},
    ],
)
def test_steered_rows_are_drawn_plainly(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Beside plain rows, in an engine whose plain steps are graphs from ids to ids."""
    torch.manual_seed(0)
    args = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=50, max_seq_len=64)
    model = Transformer(replace(args, max_batch_size=2)).requires_grad_(False)
    optimize(model)
    fields: dict[str, Any] = {"sampling": Sampling(0.8), "seed": 4, "logprobs": True} | options
    requests = [Request([1, 2, 3], 5, Sampling(0.0)), Request([3, 4], 12, **fields)]
    want = Engine(model).run(requests)
    engine = Engine(model)
    engine.compiled = step = CompiledStep(model, engine.cache)
    step.block, step.graphed = TransformerBlock.forward, True
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr("llama.engine.compiled_step.Graph", lambda run, *_: run)
    for request, drawn in zip(requests, (True, False), strict=True):
        step.graphs.clear()
        engine.run([request])
        assert any(key[0] == "draw" for key in step.graphs) is drawn  # type: ignore[index]
    found = engine.run(requests)
    assert [g.ids for g in found] == [g.ids for g in want]
    assert found[1].generated_logprobs == pytest.approx(want[1].generated_logprobs, abs=1e-4)
    assert len(found[1].top_logprobs) == (12 if "top_logprobs" in options else 0)
