"""Engine: reuse of cached prompts, chunks of long prompts, limits of the cache."""

from __future__ import annotations

import pytest
import torch

from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.model import Transformer
from tests.engine.cases import (
    GREEDY,
    SHARED,
    assert_as_alone,
    greedy,
    make_model,
    run,
    shapes_of,
)


def test_second_turn_prefills_only_what_is_new(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model)
    [first] = run(engine, greedy(SHARED, 5))
    turn = [*first.tokens, 30, 31, 32]
    shapes = shapes_of(monkeypatch, model)
    [second] = run(engine, greedy(turn, 4))
    assert second.reused == len(first.tokens) - 1  # the id drawn last was never fed
    assert shapes == [(1, 4), (1, 1), (1, 1), (1, 1)]
    again, shorter, afresh = greedy(turn, 4), greedy(turn[:-5], 4), greedy(turn, 4, reuse=False)
    done = [first, second]
    for request, reused in [(again, len(turn) - 1), (shorter, len(turn) - 6), (afresh, 0)]:
        done += run(engine, request)
        assert done[-1].reused == reused
    engine.forget()
    done += run(engine, greedy(turn, 4))
    assert done[-1].reused == 0
    assert_as_alone(model, *done)


def test_a_prefix_is_copied_from_busy_and_from_long_slots() -> None:
    model = make_model()  # whose cache is empty
    engine = Engine(model)
    busy = engine.add(greedy(SHARED, 20))
    engine.step()
    [beside] = run(engine, greedy([*SHARED, 40], 3))
    assert beside.reused == len(SHARED)
    engine.wait(lambda: busy.finish_reason)
    # The long row is copied and stays: over half of its ids are not in this prompt.
    [short] = run(engine, greedy([*SHARED[:16], 41], 3))
    [longer] = run(engine, greedy([*busy.tokens, 42], 2))
    assert short.reused == 16 and longer.reused == len(busy.tokens) - 1
    assert_as_alone(model, busy, beside, short, longer)


def test_padding_stays_within_the_cache(model: Transformer) -> None:
    engine = Engine(model)
    [first] = run(engine, greedy(list(range(44)), 1))
    at_the_end, beside = run(engine, greedy([*range(44), 50], 2), greedy(SHARED, 2))
    assert at_the_end.reused == 44
    assert_as_alone(model, first, at_the_end, beside)


def test_a_long_prompt_is_prefilled_in_chunks_and_delays_nobody(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, prefill_chunk=8)
    shapes = shapes_of(monkeypatch, model)
    talking = engine.add(Request([1, 2], 12, GREEDY))
    engine.step()
    long = engine.add(Request(list(range(40)), 3, GREEDY))
    engine.step()
    short = engine.add(Request([5, 6], 2, GREEDY))
    engine.wait(lambda: short.finish_reason)
    assert not long.ids and len(talking.ids) >= 4  # the long one is still prefilling
    engine.wait(lambda: long.finish_reason and talking.finish_reason)
    assert max(rows * width for rows, width in shapes) <= 8
    assert_as_alone(model, talking, long, short)


def test_forget_includes_running_requests(model: Transformer) -> None:
    engine = Engine(model)
    running = engine.add(greedy(SHARED, 5))
    engine.step()
    engine.forget()
    [beside] = run(engine, greedy([*SHARED, 1], 2))
    engine.wait(lambda: running.finish_reason)
    [after] = run(engine, greedy([*SHARED, 2], 2))
    assert beside.reused == 0 and after.reused == len(
        SHARED
    )  # from `beside`, which was added later
    assert_as_alone(model, running, beside, after)


def test_a_cache_shorter_than_the_model(model: Transformer) -> None:
    engine = Engine(model, max_seq_len=24)
    [generation] = run(engine, Request(SHARED, None, GREEDY))
    assert len(generation.ids) == 4 and generation.finish_reason == "length"
    with pytest.raises(ValueError, match="max_seq_len 24"):
        engine.add(Request([1] * 25))


def test_engines_and_the_models_own_cache_are_independent(model: Transformer) -> None:
    engine, other = Engine(model), Engine(model)
    [kept] = run(engine, greedy(SHARED, 4))
    running = engine.add(greedy([3, 2, 1], 9))
    engine.step()
    model(torch.randint(0, 50, (3, 40)), 0)
    run(other, greedy([5] * 40, 4))
    [after] = run(engine, greedy([*kept.tokens, 5], 4))
    engine.wait(lambda: running.finish_reason)
    assert after.reused == len(kept.tokens) - 1
    assert_as_alone(model, kept, running, after)
