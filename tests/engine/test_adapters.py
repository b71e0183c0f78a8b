"""Adapters per request: each answer is that of a plain model with its adapter merged."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from llama.engine.engine import Engine
from llama.engine.request import Generation, Request
from llama.engine.scoring import score_ids
from llama.layers.adapter_rows import add_adapters
from llama.model import ModelArgs, Transformer
from tests.adapters import Adapter, merged_model, random_adapter
from tests.engine.cases import GREEDY, SHAPE, SHARED, decoded_plainly, greedy, run
from tests.models import random_weights

PARAMS: dict[str, Any] = SHAPE
ARGS, WEIGHTS = ModelArgs(**PARAMS), random_weights(**PARAMS)
ADAPTERS: dict[str | None, Adapter | None] = {
    None: None,
    "a": random_adapter(1, ARGS, rank=2, alpha=4.0),
    "b": random_adapter(2, ARGS, rank=3, alpha=3.0, dora=True, targets=("wq", "wv", "w2")),
}
ORACLES = {name: merged_model(ARGS, WEIGHTS, adapter) for name, adapter in ADAPTERS.items()}


def make_model(**changes: Any) -> Transformer:
    model = merged_model(ModelArgs(**PARAMS | changes), WEIGHTS, None)
    add_adapters(model, {name: one for name, one in ADAPTERS.items() if name and one})
    return model


def assert_as_merged(*generations: Generation) -> None:
    for generation in generations:
        want, scores = decoded_plainly(ORACLES[generation.request.adapter], generation.request)
        assert generation.ids == want, generation.request.adapter
        assert generation.generated_logprobs == pytest.approx(scores, abs=2e-4)


def test_base_and_adapters_in_one_batch() -> None:
    """Also while some are prefilled, in chunks, and others decode, in other rows."""
    engine = Engine(make_model(), prefill_chunk=8)
    names = (None, "a", "b", "a", "b", None, "a")
    requests = [
        greedy([*SHARED[i:], 20 + i], 5 + i, adapter=name, seed=i) for i, name in enumerate(names)
    ]
    found = run(engine, *requests)
    assert_as_merged(*found)
    answers = {name: decoded_plainly(ORACLES[name], greedy(SHARED, 6))[0] for name in ADAPTERS}
    assert all(one != other for one, other in itertools.combinations(answers.values(), 2))


@pytest.mark.parametrize("first, second", itertools.permutations([None, "a", "b"], 2))
def test_cached_prompts_are_reused_by_the_same_adapter_only(
    first: str | None, second: str | None
) -> None:
    engine = Engine(make_model())
    [one] = run(engine, greedy(SHARED, 4, adapter=first))
    [other] = run(engine, greedy(SHARED, 4, adapter=second))
    [again] = run(engine, greedy(SHARED, 4, adapter=first))
    assert [one.reused, other.reused, again.reused] == [0, 0, len(SHARED) - 1]
    assert_as_merged(one, other, again)


def test_siblings_share_the_adapter_and_its_prompt() -> None:
    engine = Engine(make_model(max_batch_size=2))
    [before] = run(engine, greedy(SHARED, 2))
    group = [Generation(greedy(SHARED, 4, adapter="b", reuse=False)) for _ in range(3)]
    engine.queue_siblings(group)
    engine.wait(lambda: not engine.busy)
    assert [g.reused for g in group] == [0, 19, 19]
    assert_as_merged(before, *group)
    mixed = [Generation(greedy(SHARED, 4, adapter=name)) for name in ("a", "b")]
    with pytest.raises(ValueError, match="siblings must have the same adapter"):
        engine.queue_siblings(mixed)


@pytest.mark.parametrize("name", ADAPTERS)
def test_scores(name: str | None) -> None:
    ids = torch.tensor([SHARED])
    with torch.no_grad():
        want = torch.log_softmax(ORACLES[name](ids)[0], -1)
    scores = score_ids(Engine(make_model()), SHARED, adapter=name)
    expected = [float(want[i - 1, token]) for i, token in enumerate(SHARED) if i]
    assert scores[1:] == pytest.approx(expected, abs=2e-4)


def test_unknown_adapters_are_refused() -> None:
    engine = Engine(make_model())
    with pytest.raises(ValueError, match=r"no adapter 'c'; use one of a, b, or None"):
        engine.add(Request([1], 1, GREEDY, adapter="c"))
    with pytest.raises(TypeError, match="the name of an adapter, not 3"):
        Request([1], adapter=3)  # type: ignore[arg-type]
    plain = Engine(ORACLES[None])
    with pytest.raises(ValueError, match="this model has none; leave adapter out"):
        plain.add(Request([1], 1, GREEDY, adapter="a"))


def test_a_compiled_step_is_refused() -> None:
    with pytest.raises(ValueError, match="leave compile out"):
        Engine(make_model()).compile()
