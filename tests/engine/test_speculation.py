"""Speculation changes no id and no score, whatever is proposed and whatever runs beside it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama.engine.engine import Engine
from llama.engine.guesses import Guesses, best_plan
from llama.engine.request import Request
from llama.engine.sampling import Sampling
from llama.engine.speculation import POSITIONS, Speculation
from llama.model import Transformer
from tests.engine.cases import (
    GREEDY,
    NAN,
    SHARED,
    Visit,
    assert_as_alone,
    decoded_plainly,
    greedy,
    make_model,
    play,
    run,
)
from tests.engine.guessing import FREE, answers_to, propose_answers
from tests.engine.test_engine import visits
from tests.engine.test_engine_faults import interrupted_at
from tests.engine.test_steering import STEERED, Cycle, steered_plainly


@settings(
    max_examples=40,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(visits=visits, chunk=st.integers(1, 70), wrong=st.integers(0, 5))
def test_requests_that_join_and_leave_get_the_ids_of_plain_decoding(
    model: Transformer,
    visits: list[Visit],
    chunk: int,
    wrong: int,
) -> None:
    """Also those that are cancelled, and those that build upon what they have cached."""
    requests = [Request(**asked) for asked, _, _ in visits]
    engine = Engine(model, chunk, speculation=FREE)
    with pytest.MonkeyPatch.context() as patch:
        propose_answers(patch, answers_to(model, requests), wrong)
        generations, events = play(engine, visits)
    for generation in generations.values():
        want, scores = decoded_plainly(model, generation.request)
        if generation.finish_reason == "cancelled":
            want = want[: len(generation.ids)]
        assert generation.ids == events[generation.id] == want
        assert generation.accepted <= generation.proposed
        if generation.request.logprobs:
            assert generation.generated_logprobs == pytest.approx(scores[: len(want)], abs=1e-4)


def test_right_ids_make_fewer_steps(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    request = greedy([1, 2], 30)
    propose_answers(monkeypatch, answers_to(model, [request]), wrong=0)
    engine = Engine(model, speculation=FREE)
    [generation] = run(engine, request)
    assert_as_alone(model, generation)
    assert engine.steps <= 5 and generation.accepted == generation.proposed
    now = engine.metrics()
    assert now.accepted_tokens == now.proposed_tokens == generation.accepted > 20
    assert now.generated_tokens == 30


def test_wrong_ids_change_nothing(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [greedy([i, 2], 20) for i in range(3)]
    propose_answers(monkeypatch, answers_to(model, requests), wrong=1)
    generations = run(Engine(model, speculation=FREE), *requests)
    assert_as_alone(model, *generations)
    assert all(g.proposed and not g.accepted for g in generations)


@pytest.mark.parametrize("how", [GREEDY, Sampling(0.9, 0.95), Sampling(0.3, 1.0, top_k=3)])
@pytest.mark.parametrize("seed", [None, 7])
def test_a_seed_gives_the_ids_that_it_gives_without(
    model: Transformer, how: Sampling, seed: int | None
) -> None:
    """By the lookup itself, in a prompt that repeats; also from torch's global generator."""
    request = Request(SHARED[:6] * 3, 25, how, seed, logprobs=True, top_logprobs=3)
    found = []
    for speculation in None, FREE:
        torch.manual_seed(5)
        found += run(Engine(model, speculation=speculation), request)
    plain, fast = found
    assert fast.ids == plain.ids and fast.proposed
    assert fast.generated_logprobs == pytest.approx(plain.generated_logprobs, abs=1e-4)
    for one, other in zip(fast.top_logprobs, plain.top_logprobs, strict=True):
        assert [i for i, _ in one] == [i for i, _ in other]
    torch.manual_seed(5)
    rows = run(Engine(model, speculation=FREE), *[request] * 3)
    torch.manual_seed(5)
    assert [g.ids for g in rows] == [g.ids for g in run(Engine(model), *[request] * 3)]


@pytest.mark.parametrize("wrong", [0, 3])
def test_penalties_and_bias_are_applied_at_each_position(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    requests = [Request([1 + i, 2, 3], 14, **o) for i, o in enumerate(STEERED)]
    want = [steered_plainly(model, request, 14) for request in requests]
    answers = [(r.prompt, ids) for r, ids in zip(requests, want, strict=True)]
    propose_answers(monkeypatch, answers, wrong)
    generations = run(Engine(model, speculation=FREE), *requests)
    assert [g.ids for g in generations] == want and any(g.accepted for g in generations)


@pytest.mark.parametrize("wrong", [0, 4])
def test_a_grammar_follows_accepted_ids_only(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, wrong: int
) -> None:
    """Its state refuses an id that it does not allow: a rejected one must not reach it."""
    grammar = Cycle(10)
    request = Request([1, 2], 20, GREEDY, stop_tokens=[5], grammar=grammar)
    want = [20, 21, 22] * 3 + [20]
    propose_answers(monkeypatch, [(request.prompt, [*want, 5])], wrong)
    engine = Engine(model, speculation=FREE)
    [generation] = run(engine, request)
    assert generation.ids == want and generation.finish_reason == "stop"
    assert generation.accepted and engine.steps < 10
    assert [state.accepted for state in grammar.states] == [want[: len(grammar.states[0].accepted)]]


@pytest.mark.parametrize("at", range(6))
def test_an_answer_ends_within_accepted_ids(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """At a stop token, with an event for each id before it; nothing of what follows is cached."""
    ids, _ = decoded_plainly(model, greedy([1, 2], 12))
    stop = ids[at]
    request = greedy([1, 2], 12, stop_tokens=[stop])
    propose_answers(monkeypatch, [(request.prompt, ids)], wrong=0)
    engine = Engine(model, speculation=FREE)
    generation = engine.add(request)
    events = []
    while engine.busy:
        events += engine.step()
    want = ids[: ids.index(stop)]
    assert generation.ids == want and generation.stop_token == stop
    assert [e.token for e in events] == [*want, None] and events[-1].finish_reason == "stop"
    assert all(e.finish_reason is None for e in events[:-1])
    [longer] = run(engine, greedy([1, 2, *want, 9], 9))  # builds upon what is cached
    assert_as_alone(model, generation, longer)


@pytest.mark.parametrize("most", [0, 1, 2, 7, None])
def test_a_budget_and_the_end_of_the_cache_limit_what_is_proposed(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, most: int | None
) -> None:
    """Also beside a longer row, whose padding must not pass the end of the cache."""
    requests = [Request(SHARED, most, GREEDY), Request([*SHARED, *SHARED], None, GREEDY)]
    propose_answers(monkeypatch, answers_to(model, requests), wrong=0)
    generations = run(Engine(model, speculation=FREE), *requests)
    assert_as_alone(model, *generations)
    assert {g.finish_reason for g in generations} == {"length"}


def test_a_rejected_id_that_computes_nan_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    requests = [greedy([1, 2], 12), greedy(SHARED, 12)]
    answers = answers_to(model, requests)
    with torch.no_grad():
        model.tok_embeddings.weight[NAN] = float("nan")
    propose_answers(monkeypatch, [(p, [*ids[:4], *[NAN] * 8]) for p, ids in answers], wrong=0)
    generations = run(Engine(model, speculation=FREE), *requests)
    assert [g.ids for g in generations] == [ids for _, ids in answers]


@pytest.mark.parametrize("first", range(1, 6))
def test_an_interrupt_at_any_line_loses_no_id(
    model: Transformer, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """Neither of a plain row nor of a steered one, whose grammar may be ahead."""
    grammar = Cycle(7)
    requests = [
        greedy(SHARED, 6),
        Request([1, 2], 9, GREEDY, stop_tokens=[5], logprobs=True, grammar=grammar),
    ]
    want = [decoded_plainly(model, requests[0])[0], [20, 21, 22, 20, 21, 22, 20]]
    answers = [(r.prompt, [*ids, 5]) for r, ids in zip(requests, want, strict=True)]
    propose_answers(monkeypatch, answers, wrong=4)
    engine, interrupts = Engine(model, prefill_chunk=8, speculation=FREE), 0
    for line in range(first, 900, 29):
        generations = [engine.add(request) for request in requests]
        before = sys.gettrace()
        sys.settrace(interrupted_at(line))
        try:
            for _ in range(4):
                engine.step()
        except KeyboardInterrupt:
            interrupts += 1
        finally:
            sys.settrace(before)
        engine.wait(lambda: all(g.finish_reason for g in generations))  # noqa: B023
        for generation, ids in zip(generations, want, strict=True):
            lost = isinstance(generation.error, RuntimeError)  # rows were changing places
            assert lost or generation.ids == ids, line
            assert lost or len(generation.generated_logprobs) == len(ids)
    assert interrupts > 10


def test_only_few_rows_are_checked(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [greedy([i, 2], 20) for i in range(3)]
    propose_answers(monkeypatch, answers_to(model, requests), wrong=0)
    generations = run(Engine(model, speculation=Speculation(rows=2)), *requests)
    assert_as_alone(model, *generations)
    assert not any(g.proposed for g in generations)


def test_wrong_ids_cost_at_most_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the table of costs, whatever the table says."""
    model = make_model(max_seq_len=400)
    request = Request([1, 2], 380, GREEDY)
    propose_answers(monkeypatch, [], wrong=0)
    for costs in (1.0, 1.1, 1.2, 1.4, 2.0), (1.0, 1.5, 2.0, 3.0, 5.0):
        [generation] = run(Engine(model, speculation=Speculation(costs=costs)), request)
        assert generation.accepted < 40
        lost = min(costs[1] - 1, 0.2) * (generation.proposed - 15 * generation.accepted)
        assert lost < 0.03 * 380


def test_the_count_with_the_best_gain_is_proposed() -> None:
    free, dear = [1.0] * 16, [1.0 + k for k in range(16)]
    assert best_plan(0.9, free).number == 15 and best_plan(0.9, dear).number == 0
    flat = Speculation(costs=(1.0, 1.1, 1.3, 1.7, 2.5)).ratios(1)
    for rate in (0.1, 0.3, 0.6, 0.9):
        gains = [sum(rate**i for i in range(k + 1)) / flat[k] for k in range(16)]
        plan = best_plan(rate, flat)
        assert plan.number == (gains.index(max(gains)) if max(gains) > 1.03 else 0)


def test_costs_are_interpolated_and_relative_to_a_step_of_so_many_rows() -> None:
    options = Speculation(costs=(1.0, 1.2, 1.4, 2.0, 4.0))
    assert options.ratios(1)[:4] == pytest.approx([1.0, 1.2, 1.3, 1.4])
    assert len(options.ratios(1)) == POSITIONS[-1]
    assert options.ratios(2) == pytest.approx([x / 1.2 for x in (1.2, 1.4, 1.7, 2, 2.5, 3, 3.5, 4)])


@pytest.mark.parametrize(
    "options", [{"rows": 0}, {"rows": 9}, {"rows": True}, {"costs": (1.0,)}, {"costs": (0.5,) * 5}]
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Speculation(**options)


def test_a_row_that_repeats_is_proposed_more_and_more() -> None:
    guesses, counts = Guesses(), []
    ratios = Speculation(costs=(1.0, 1.2, 1.4, 2.0, 4.0)).ratios(1)
    for n in range(8):
        plan = guesses.plan(3, ratios, n)
        guesses.propose(plan)
        guesses.learn(plan.number, plan.number)
        counts.append(plan.number)
    assert counts == sorted(counts) and counts[-1] >= 2 * counts[0] > 0
    for n in range(40):
        plan = guesses.plan(3, ratios, n)
        guesses.propose(plan)
        guesses.learn(plan.number, 0)
    assert guesses.plan(3, ratios, 40).number == 0
