"""A draft model: greedy ids are the model's own, and sampled ones have the model's distribution."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.engine.draft import Draft
from llama.engine.engine import Engine
from llama.engine.proposal import accept_or_redraw
from llama.engine.request import Request
from llama.engine.sampling import Sampling, distribution, pick, sample
from llama.engine.speculation import Speculation
from llama.model import ModelArgs, Transformer
from tests.engine.cases import GREEDY, SHAPE, SHARED, assert_as_alone, greedy, make_model, run
from tests.models import random_weights

# Prompt lookup is off, and a proposed id costs nothing.
DRAFTED = Speculation(lookup=False, costs=(1.0,) * 5)
V = SHAPE["vocab_size"]


def other_model(**changes: int) -> Transformer:
    args: dict[str, Any] = SHAPE | {"dim": 16, "n_layers": 1} | changes
    model = Transformer(ModelArgs(**args))
    model.load_state_dict(random_weights(3, **args))
    return model.eval()


def similar_model() -> Transformer:
    """The model of the tests with other output weights, which is right more often."""
    model, generator = make_model(), torch.Generator().manual_seed(4)
    with torch.no_grad():
        model.output.weight += 0.1 * torch.randn(model.output.weight.shape, generator=generator)
    return model


def engine_of(model: Transformer, draft: Transformer, rows: int = 2) -> Engine:
    room = model.params.max_seq_len
    drafted = Draft(draft, rows, room, model.vocab_size, 0.0)
    return Engine(model, speculation=DRAFTED, draft=drafted)


def significance(counts: Counter[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> float:
    """Standard deviations of a chi-square statistic from its mean: about 0 if all is as it should.

    Outcomes that are expected fewer than 5 times are one.
    """
    n = counts.total()
    assert set(counts) <= {key for key, p in chances.items() if p > 0}
    often = [key for key, p in chances.items() if n * p >= 5]
    rare = 1 - sum(chances[key] for key in often)
    pairs = [(counts[key], n * chances[key]) for key in often]
    if n * rare >= 5:
        pairs.append((n - sum(counts[key] for key in often), n * rare))
    statistic = sum((seen - want) ** 2 / want for seen, want in pairs)
    degrees = len(pairs) - 1
    return (statistic - degrees) / math.sqrt(2 * degrees)


def limited_plainly(logits: Tensor, how: Sampling) -> list[float]:
    """The distribution, by its definition over a sorted list."""
    probs = torch.softmax(logits.double() / how.temperature, -1).tolist()
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    kept = order[: how.top_k or None]
    kept = [i for i in kept if probs[i] >= how.min_p * probs[order[0]]]
    mass, total, nucleus = 0.0, sum(probs[i] for i in kept), []
    for i in kept:
        if mass > how.top_p:
            break
        nucleus.append(i)
        mass += probs[i] / total
    whole = sum(probs[i] for i in nucleus)
    return [probs[i] / whole if i in nucleus else 0.0 for i in range(len(probs))]


SETTINGS = [
    Sampling(1.0, 1.0),
    Sampling(0.7, 0.8),
    Sampling(1.3, 1.0, top_k=4),
    Sampling(0.9, 0.95, top_k=9, min_p=0.1),
]


@pytest.mark.parametrize("how", SETTINGS)
def test_the_rule_gives_the_distribution_of_the_model(how: Sampling) -> None:
    """arXiv:2211.17192: ids drawn from q, accepted or drawn again, are distributed as p."""
    torch.manual_seed(1)
    logits, other = torch.randn(12) * 2, torch.randn(12) * 2
    p, q = limited_plainly(logits, how), distribution(other.unsqueeze(0), how)[0]
    assert distribution(logits.unsqueeze(0), how)[0].tolist() == pytest.approx(p, abs=1e-6)
    assert q.tolist() == pytest.approx(limited_plainly(other, how), abs=1e-6)
    generator = torch.Generator().manual_seed(2)
    found = Counter[tuple[int, ...]]()
    accepted, n = 0, 2000
    for _ in range(n):
        proposed = pick(q, generator)
        token = accept_or_redraw(logits, how, proposed, q, generator)
        accepted += token == proposed
        found[(token,)] += 1
    assert abs(significance(found, {(i,): x for i, x in enumerate(p)})) < 4
    overlap = sum(map(min, p, q.tolist()))  # the rate of acceptance that the paper proves
    assert accepted / n == pytest.approx(overlap, abs=4 * math.sqrt(0.25 / n))


def test_answers_have_the_distribution_of_the_model(model: Transformer) -> None:
    """All answers of three ids, with their exact probabilities; also at the end of a draft."""
    how, prompt, n = Sampling(1.5, 1.0, top_k=2), [1, 2, 3], 300
    chances: dict[tuple[int, ...], float] = {}

    def add(ids: list[int], chance: float) -> None:
        if len(ids) == 3:
            chances[tuple(ids)] = chance
            return
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids]))[0, -1]
        for token, p in enumerate(limited_plainly(logits, how)):
            if p:
                add([*ids, token], chance * p)

    add([], 1.0)
    engine = engine_of(model, similar_model())
    found = Counter[tuple[int, ...]]()
    for seed in range(0, n, 2):
        pair = run(engine, *(Request(prompt, 3, how, seed + i) for i in range(2)))
        found.update(tuple(generation.ids) for generation in pair)
    now = engine.metrics()
    assert 0 < now.accepted_tokens < now.proposed_tokens and len(chances) == 8
    assert abs(significance(found, chances)) < 4


def test_greedy_ids_are_the_models_own(model: Transformer) -> None:
    """Rows come and go, and outnumber those of the draft."""
    engine = engine_of(model, other_model())
    first = engine.add(greedy(SHARED, 20))
    requests = [greedy([i, *SHARED[:4]], 12) for i in range(5)]
    assert_as_alone(model, *run(engine, *requests), first)
    assert engine.metrics().proposed_tokens


@pytest.mark.parametrize("how", [GREEDY, Sampling(0.8, 0.9), Sampling(1.1, 1.0, top_k=5)])
def test_a_draft_that_is_the_model_is_always_right(model: Transformer, how: Sampling) -> None:
    engine = engine_of(model, model)
    generations = run(engine, *(Request([i, 2], 25, how, seed=i) for i in range(2)))
    assert all(g.proposed == g.accepted > 10 for g in generations)
    again = run(engine_of(model, model), *(Request([i, 2], 25, how, seed=i) for i in range(2)))
    assert [g.ids for g in again] == [g.ids for g in generations]


@pytest.mark.parametrize("rows", [V - 8, V + 8])
def test_padded_vocabularies(model: Transformer, rows: int) -> None:
    """Ids that only one of the models has are never proposed, or never drawn by the draft."""
    draft = other_model(vocab_size=rows)
    draft.unused = torch.tensor([4, *range(V, rows)])
    engine = engine_of(model, draft)
    requests = [greedy([1, 2], 20), Request([3, 1], 20, Sampling(0.9), seed=1)]
    plain, drawn = run(engine, *requests)
    last = greedy([V - 1, 2], 6)  # which the draft may have no embedding of
    assert_as_alone(model, plain, *run(engine, last, greedy([4, 2], 6)))
    assert all(0 <= token < V for token in drawn.ids)


def test_a_conversation_goes_on_in_the_row_that_has_its_beginning(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = other_model()
    engine = engine_of(model, draft)
    [first] = run(engine, greedy(SHARED, 8))
    fed: list[int] = []
    hidden = draft.hidden

    def spy(tokens: Tensor, *args: object, **kwargs: object) -> Tensor:
        fed.append(tokens.numel())
        return hidden(tokens, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(draft, "hidden", spy)
    [second] = run(engine, greedy([*first.tokens, 9], 8))
    assert fed[0] < 8 and second.proposed
    assert_as_alone(model, first, second)


def test_a_draft_that_fails_is_given_up(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for fault in "memory", "nan":
        draft = other_model()
        if fault == "nan":
            with torch.no_grad():
                draft.norm.weight.fill_(math.nan)
        else:

            def fail(*args: object, **kwargs: object) -> Tensor:
                raise torch.OutOfMemoryError("no memory for the draft")

            monkeypatch.setattr(draft, "hidden", fail)
        caplog.clear()
        generations = run(engine_of(model, draft), greedy([1, 2], 9), greedy(SHARED, 9))
        assert_as_alone(model, *generations)
        assert caplog.text.count("the draft model has failed and is not used any more") == 1


def test_close_lets_go_of_the_draft(model: Transformer) -> None:
    engine = engine_of(model, other_model())
    run(engine, greedy([1, 2], 5))
    engine.close()
    assert engine.speculator.draft is None
    assert list(itertools.chain(engine.cache)) == []


def test_a_draft_needs_speculation(model: Transformer) -> None:
    draft = Draft(other_model(), 1, model.params.max_seq_len, model.vocab_size, 0.0)
    with pytest.raises(ValueError, match="a draft needs a Speculation"):
        Engine(model, draft=draft)


def test_pick_never_takes_what_has_no_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor([0.0, 1e-30, 0.0, 2.0, 0.0])
    assert {pick(weights, generator) for _ in range(50)} == {3}
    how = Sampling(1.0, 1.0)
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]]))
    drawn = [int(sample(logits, how, [generator])) for _ in range(300)]
    assert set(drawn) == {0, 1, 2}
