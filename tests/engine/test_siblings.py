"""Several answers to one prompt: as separate requests, but the prompt is computed once."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from llama.common.errors import QueueFull
from llama.engine.engine import Engine
from llama.engine.request import Generation, Request
from llama.engine.sampling import Sampling
from llama.model import Transformer
from tests.engine.cases import (
    GREEDY,
    NAN,
    SHARED,
    assert_as_alone,
    make_model,
    run,
    shapes_of,
)
from tests.engine.test_engine_faults import interrupted_at

HOW = Sampling(0.9, 0.95)


def siblings(n: int, prompt: list[int] = SHARED, **options: Any) -> list[Generation]:
    fields: dict[str, Any] = {"max_gen_len": 6, "sampling": HOW, "logprobs": True, "reuse": False}
    fields |= options
    return [Generation(Request(prompt, seed=j, **fields)) for j in range(n)]


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("reuse", [False, True])
def test_the_prompt_is_computed_once(
    monkeypatch: pytest.MonkeyPatch, slots: int, reuse: bool
) -> None:
    """Also with other requests before, beside and behind, that would take their rows."""
    model = make_model(max_batch_size=slots)
    engine = Engine(model, prefill_chunk=6)
    before = run(engine, Request([*SHARED, 30], 3, GREEDY, logprobs=True))
    shapes = shapes_of(monkeypatch, model)
    group = siblings(5, [31, *SHARED], reuse=reuse)
    engine.queue_siblings(group)
    behind = [engine.add(Request([40 + i] * 21, 2, HOW, seed=9, reuse=False)) for i in range(3)]
    engine.wait(lambda: not engine.busy)
    assert [g.reused for g in group] == [0, 20, 20, 20, 20]
    computed = sum(rows * length for rows, length in shapes if length > 1)
    assert computed <= 4 * 21 + 3 * 6  # four prompts, and their padding
    assert_as_alone(model, *before, *group, *behind)
    now = engine.metrics()
    assert now.prompt_tokens == 21 * 9 and now.cached_tokens == 20 * 4


def test_scores_of_the_prompt_are_those_of_the_first(model: Transformer) -> None:
    engine = Engine(model, prefill_chunk=6)
    group = siblings(4, score_from=2, top_logprobs=3)
    engine.queue_siblings(group)
    engine.wait(lambda: not engine.busy)
    [alone] = run(engine, Request(SHARED, 0, score_from=2, top_logprobs=3))
    for generation in group:
        assert generation.prompt_logprobs == pytest.approx(alone.prompt_logprobs)
        assert len(generation.prompt_top_logprobs) == len(SHARED)
    assert [g.reused for g in group] == [0, 19, 19, 19]
    assert_as_alone(model, *group)
    only_scored = siblings(3, score_from=0, max_gen_len=0)
    engine.queue_siblings(only_scored)
    engine.wait(lambda: not engine.busy)
    assert [len(g.prompt_logprobs) for g in only_scored] == [20] * 3
    assert {g.finish_reason for g in only_scored} == {"length"}


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("options", [{}, {"score_from": 0}])
def test_the_first_is_cancelled_in_its_prefill(slots: int, options: dict[str, Any]) -> None:
    model = make_model(max_batch_size=slots)
    engine = Engine(model, prefill_chunk=6)
    group = siblings(4, **options)
    engine.queue_siblings(group)
    engine.step()
    assert not group[0].ids and engine.cancel(group[0].id)
    engine.step()
    engine.cancel(group[2].id)
    engine.wait(lambda: not engine.busy)
    assert [g.finish_reason for g in group] == ["cancelled", "length", "cancelled", "length"]
    assert_as_alone(model, group[1], group[3])
    if not options:
        assert group[1].reused == 6  # what the first had computed
        assert group[3].reused == 19
    else:
        assert [len(g.prompt_logprobs) for g in group[1::2]] == [20, 20]


def test_the_first_fails_in_its_prefill(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one computes the prompt."""
    engine, hidden, calls = Engine(model, prefill_chunk=6), model.hidden, 0

    def scarce(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("no memory")
        return hidden(*args, **kwargs)

    monkeypatch.setattr(model, "hidden", scarce)
    group = siblings(3)
    engine.queue_siblings(group)
    engine.wait(lambda: not engine.busy)
    assert [g.finish_reason for g in group] == ["error", "length", "length"]
    assert [g.reused for g in group] == [0, 0, 19]
    assert_as_alone(model, *group[1:])


def test_nan_fails_all_siblings_and_nobody_else() -> None:
    model = make_model()
    with torch.no_grad():
        model.tok_embeddings.weight[NAN] = float("nan")
    engine = Engine(model)
    group = siblings(3, [*SHARED, NAN])
    engine.queue_siblings(group)
    good = engine.add(Request(SHARED, 4, GREEDY, logprobs=True))
    engine.wait(lambda: not engine.busy)
    assert [g.finish_reason for g in group] == ["error"] * 3
    assert_as_alone(model, good)


def test_all_or_none(model: Transformer) -> None:
    engine = Engine(model, max_queue=1)
    one = siblings(1)
    engine.queue_siblings(one)
    different = [Generation(Request(prompt, 2, GREEDY)) for prompt in ([1, 2], [1, 3])]
    with pytest.raises(ValueError, match="siblings must have the same prompt"):
        engine.queue_siblings(different)
    with pytest.raises(ValueError, match="max_seq_len"):
        engine.queue_siblings(siblings(2, [1] * 49))
    with pytest.raises(QueueFull, match="1 requests wait already"):
        engine.queue_siblings(siblings(4))
    with pytest.raises(ValueError, match="only 4 requests may run and wait"):
        engine.queue_siblings(siblings(5))
    assert engine.metrics().requests == 1 and all(g.id == 0 for g in different)
    engine.queue_siblings(siblings(3))
    assert engine.metrics().requests == 4


@pytest.mark.parametrize("file", ["unfinished", "admission", "slots"])
def test_an_interrupt_at_any_line(model: Transformer, file: str) -> None:
    """All siblings are queued or none; those that go on get their ids; the counts agree."""
    interrupts, line = 0, 0
    while interrupts == line:
        line += 1
        engine, group = Engine(model, prefill_chunk=16), siblings(4, max_gen_len=1, sampling=GREEDY)
        before = sys.gettrace()
        sys.settrace(interrupted_at(line, f"engine/{file}.py"))
        try:
            engine.queue_siblings(group)
            while engine.busy:
                engine.step()
        except KeyboardInterrupt:
            interrupts += 1
        finally:
            sys.settrace(before)
        while engine.busy:
            engine.step()
        engine.step()
        queued = [g for g in group if g.finish_reason is not None]
        assert len(queued) in (0, 4), line
        assert_as_alone(model, *(g for g in queued if g.error is None))
        now = engine.metrics()
        assert now.requests == sum(now.finished.values()) == len(queued), line
        assert now.generated_tokens == sum(len(g.ids) for g in group if g in queued)
    assert interrupts > 50
