"""Engine: every request gets the ids that it would get alone, whatever runs beside it."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama.engine.engine import Engine
from llama.engine.request import Generation, Request
from llama.engine.sampling import Sampling
from llama.model import Transformer
from tests.engine.cases import (
    GREEDY,
    NAN,
    SHARED,
    Visit,
    assert_as_alone,
    decoded_plainly,
    in_threads,
    play,
    run,
    shapes_of,
)

ids = st.integers(0, NAN - 1)
prompts = st.builds(
    lambda shared, own: SHARED[:shared] + own,
    st.integers(0, len(SHARED)),
    st.lists(ids, min_size=1, max_size=28),
)
asked: st.SearchStrategy[dict[str, Any]] = st.builds(
    dict,
    prompt=prompts,
    max_gen_len=st.none() | st.integers(0, 12),
    sampling=st.sampled_from([GREEDY, Sampling(0.8, 0.9), Sampling(1.2, 1.0, top_k=9)]),
    seed=st.integers(0, 99),
    stop_tokens=st.sets(ids, max_size=3),
    logprobs=st.booleans(),
    score_from=st.none() | st.integers(0, 30),
    reuse=st.booleans(),
)
# A request, the step before which it is added, and the step before which it is cancelled.
visits = st.lists(
    st.tuples(asked, st.integers(0, 12), st.none() | st.integers(0, 20)), min_size=1, max_size=9
)


@settings(
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(visits=visits, chunk=st.integers(1, 70))
def test_requests_that_join_and_leave_do_not_affect_each_other(
    model: Transformer, visits: list[Visit], chunk: int
) -> None:
    engine = Engine(model, chunk)
    generations, events = play(engine, visits)
    assert len(generations) == len(visits)
    for generation in generations.values():
        request = generation.request
        want, scores = decoded_plainly(model, request)
        if generation.finish_reason == "cancelled":
            want = want[: len(generation.ids)]
        assert generation.ids == events[generation.id] == want
        if request.logprobs:
            assert generation.generated_logprobs == pytest.approx(scores[: len(want)], abs=1e-4)
        if request.score_from is not None and generation.finish_reason != "cancelled":
            with torch.no_grad():
                raw = torch.log_softmax(model(torch.tensor([request.prompt]))[0], -1)
            first = min(max(1, request.score_from), len(request.prompt))
            scored = [raw[i - 1, request.prompt[i]].item() for i in range(first, len(raw))]
            assert generation.prompt_logprobs[:first] == [None] * first
            assert generation.prompt_logprobs[first:] == pytest.approx(scored, abs=1e-4)


def test_finished_rows_cost_nothing(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = shapes_of(monkeypatch, model)
    run(Engine(model), *(Request([i, 1], n, GREEDY) for i, n in enumerate((2, 6, 4))))
    assert shapes == [(3, 2), (3, 1), (2, 1), (2, 1), (1, 1), (1, 1)]


def test_cancel(model: Transformer) -> None:
    engine = Engine(model)
    first, *others = [engine.add(Request([i, 1], 9, GREEDY)) for i in range(4)]
    last = others[-1]
    engine.step()
    assert first.ids and not last.ids  # the last one waits for a slot
    assert engine.cancel(first.id) and first.finish_reason == "cancelled"
    assert not engine.cancel(first.id)
    engine.step()
    assert last.ids and len(first.ids) == 1
    for generation in others:
        engine.cancel(generation.id)
    assert not engine.busy and engine.step() == []
    for unknown in (99, 0, -1, "x", None):
        with pytest.raises(ValueError, match="no request has the id"):
            engine.cancel(unknown)  # type: ignore[arg-type]


def test_bad_requests_leave_the_others_alone(model: Transformer) -> None:
    engine = Engine(model)
    good = engine.add(Request(SHARED, 6, GREEDY))
    for bad, error in [
        (Request([]), "is empty"),
        (Request([1] * 49), "max_seq_len 48"),
        (Request([60]), "ids are 0 to 59"),
    ]:
        with pytest.raises(ValueError, match=error):
            engine.add(bad)
    with pytest.raises(TypeError, match="takes a Request"):
        engine.add("x")  # type: ignore[arg-type]
    engine.wait(lambda: good.finish_reason)
    assert_as_alone(model, good)
    with pytest.raises(RuntimeError, match="no request is left"):
        engine.wait(lambda: False)
    with pytest.raises(ValueError, match="prefill_chunk"):
        Engine(model, 0)


def test_a_request_checks_its_fields_and_is_immutable() -> None:
    with pytest.raises(ValueError, match="max_gen_len"):
        Request([1], -1)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"seed": "x"}, "seed"),
        ({"sampling": None}, "sampling"),
        ({"stop_tokens": None}, "stop_tokens"),
        ({"score_from": "a"}, "score_from"),
        ({"max_gen_len": 1.5}, "max_gen_len"),
        ({"prompt": "text"}, "must be a list of token ids"),
        ({"prompt": [1, True]}, "holds True"),
    ]
    for options, error in bad:
        fields = {"prompt": [1]} | options
        with pytest.raises(TypeError, match=error):
            Request(**fields)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request([1]).seed = 3  # type: ignore[misc]


def test_a_request_may_run_again(model: Transformer) -> None:
    engine, request = Engine(model), Request([1, 2], 5, Sampling(0.9), seed=4)
    first, second = run(engine, request, request)
    assert first.id != second.id and first.ids == second.ids == decoded_plainly(model, request)[0]


def test_changes_of_the_callers_lists_have_no_effect(model: Transformer) -> None:
    engine, prompt, stops = Engine(model), [1, 2, 3], {58}
    generation = engine.add(Request(prompt, 6, GREEDY, stop_tokens=stops))
    while engine.busy:
        for event in engine.step():
            prompt.append(event.token or 0)
            stops.add(event.token or 0)
    assert generation.ids == decoded_plainly(model, Request([1, 2, 3], 6, GREEDY))[0] == prompt[3:]


def test_run_calls_back_after_each_step_and_ends_its_requests(model: Transformer) -> None:
    """`after_step` sees one more id each time and may cancel; its error cancels the others."""
    engine, seen = Engine(model), []

    def after_step(generations: Sequence[Generation]) -> None:
        seen.append([len(g.ids) for g in generations])
        if len(generations[0].ids) == 2:
            engine.cancel(generations[0].id)

    requests = [Request([1, 2], 9, GREEDY), Request([3], 4, GREEDY), Request([60])]
    first, second, refused = engine.run(requests, after_step)
    assert seen == [[1, 1, 0], [2, 2, 0], [2, 3, 0], [2, 4, 0]]
    assert (
        first.finish_reason == "cancelled" and second.ids == decoded_plainly(model, requests[1])[0]
    )
    assert refused.finish_reason == "error" and "ids are 0 to 59" in str(refused.error)
    with pytest.raises(ZeroDivisionError):
        engine.run(requests, lambda _: 1 / 0)
    assert not engine.busy


def test_close_cancels_requests_and_refuses_new_ones(model: Transformer) -> None:
    engine = Engine(model)
    running, cache = engine.add(Request([1, 2], 9, GREEDY)), weakref.ref(engine.cache[0].k)
    engine.step()
    engine.close()
    assert running.finish_reason == "cancelled" and len(running.ids) == 1 and not engine.busy
    assert cache() is None and not hasattr(engine, "model")
    with pytest.raises(RuntimeError, match="closed"):
        engine.add(Request([1]))


def test_threads_share_one_engine(model: Transformer) -> None:
    engine = Engine(model, prefill_chunk=8)
    requests = [Request(SHARED[: i + 1], 10, Sampling(0.9), seed=i) for i in range(12)]
    done: list[Generation] = []

    def run_one_by_one(some: list[Request]) -> None:
        for request in some:
            done.extend(run(engine, request))

    in_threads([partial(run_one_by_one, requests[i::4]) for i in range(4)])
    assert len(done) == 12 and not engine.busy
    assert_as_alone(model, *done)


def test_cancel_from_another_thread_during_a_step(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model)
    first, second = (engine.add(Request([i, 1], 9, GREEDY)) for i in range(2))
    hidden = model.hidden

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        if len(second.ids) == 3:
            in_threads([lambda: engine.cancel(first.id)])
        return hidden(*args, **kwargs)

    monkeypatch.setattr(model, "hidden", spy)
    engine.wait(lambda: second.finish_reason)
    assert first.finish_reason == "cancelled" and len(first.ids) == 3
    assert_as_alone(model, second)


def test_unseeded_rows_draw_from_the_global_generator(model: Transformer) -> None:
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        engine = Engine(model)
        mixed = [Request([1, 2], 8, Sampling(1.0)), Request([3], 8, Sampling(1.0), seed=5)]
        runs.append([g.ids for g in run(engine, *mixed)])
    assert runs[0] == runs[1] and runs[0][0] != runs[2][0] and runs[0][1] == runs[2][1]
