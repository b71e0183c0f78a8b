"""Bias, penalties, grammars, top log-probabilities: equal to plain arithmetic, alone and mixed."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from llama.engine.engine import Engine
from llama.engine.request import Generation, Request
from llama.engine.sampling import Sampling, sample
from llama.model import Transformer
from tests.engine.cases import GREEDY, SHAPE, SHARED, assert_as_alone, make_model, run
from tests.engine.test_engine_faults import interrupted_at

V = SHAPE["vocab_size"]


class Cycle:
    """A grammar: the ids 20, 21, 22, 20, ... or, where it may end, the stop token 5.

    Each state counts what it is told, and refuses an id that it does not allow.
    """

    def __init__(self, length: int, width: int = V):
        self.length, self.width = length, width
        self.states: list[CycleState] = []

    def start(self) -> CycleState:
        self.states.append(CycleState(self))
        return self.states[-1]


class CycleState:
    def __init__(self, grammar: Cycle):
        self.grammar, self.accepted = grammar, list[int]()

    def allowed(self) -> torch.Tensor:
        mask = torch.zeros(self.grammar.width, dtype=torch.bool)
        n = len(self.accepted)
        mask[20 + n % 3 if n < self.grammar.length else 5] = True
        return mask

    def accept(self, token: int) -> None:
        assert self.allowed()[token]
        self.accepted.append(token)


def steered_plainly(model: Transformer, request: Request, steps: int) -> list[int]:
    """The ids, by the formula of OpenAI's documentation over the logits of a whole sequence."""
    ids = list(request.prompt)
    generator = None if request.seed is None else torch.Generator().manual_seed(request.seed)
    how = request.sampling
    for _ in range(steps):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1].tolist()
        counts = Counter(ids[len(request.prompt) :])
        for j, c in counts.items():
            logits[j] -= c * how.frequency_penalty + float(c > 0) * how.presence_penalty
        for j, bias in request.logit_bias.items():
            logits[j] += bias
        plain = Sampling(how.temperature, how.top_p, how.top_k, how.min_p)
        row = torch.tensor([logits])
        ids.append(int(sample(row, plain, None if generator is None else [generator])))
    return ids[len(request.prompt) :]


STEERED: list[dict[str, Any]] = [
    {"sampling": Sampling(0.0, frequency_penalty=0.4)},
    {"sampling": Sampling(0.0, presence_penalty=1.5)},
    {"sampling": Sampling(0.0, presence_penalty=-0.7, frequency_penalty=-0.2)},
    {"sampling": Sampling(0.9, 0.95, presence_penalty=0.8, frequency_penalty=0.3), "seed": 3},
    {"sampling": GREEDY, "logit_bias": {7: 2.5, 9: -100}},
    {"sampling": Sampling(1.1, 1.0, 8, 0.01, 0.5, 2.0), "seed": 8, "logit_bias": {0: 1, 59: 3}},
]


def test_penalties_and_bias_equal_the_formula(model: Transformer) -> None:
    """Each alone, and all at once with plain rows beside them."""
    steered = [Request([1 + i, 2, 3], 14, logprobs=True, **o) for i, o in enumerate(STEERED)]
    want = [steered_plainly(model, request, 14) for request in steered]
    plain = [Request([4, 4], 12, GREEDY, logprobs=True), Request([9], 12, Sampling(0.9), seed=1)]
    unsteered = [Request(r.prompt, 14, GREEDY) for r in steered]
    assert want != [g.ids for g in run(Engine(model), *unsteered)]
    for request, ids in zip(steered, want, strict=True):
        assert run(Engine(model), request)[0].ids == ids
    mixed = run(Engine(make_model(max_batch_size=5)), *plain, *steered)
    assert [g.ids for g in mixed[2:]] == want
    assert_as_alone(model, *mixed[:2])


def raw_scores(model: Transformer, ids: Sequence[int]) -> torch.Tensor:
    """(len(ids), V) log-probabilities of what follows each id."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids]))[0].double(), -1)


def test_logprobs_are_of_the_raw_distribution(model: Transformer) -> None:
    how = Sampling(0.7, 0.9, presence_penalty=2, frequency_penalty=1)
    request = Request(SHARED, 9, how, 4, logprobs=True, logit_bias={3: 4}, top_logprobs=5)
    [generation] = run(Engine(model), request)
    raw = raw_scores(model, generation.tokens)[len(SHARED) - 1 : -1]
    chosen = [raw[i, token].item() for i, token in enumerate(generation.ids)]
    assert generation.generated_logprobs == pytest.approx(chosen, abs=1e-4)
    for row, top in zip(raw, generation.top_logprobs, strict=True):
        values, ids = row.topk(5)
        assert [id for id, _ in top] == ids.tolist()
        assert [score for _, score in top] == pytest.approx(values.tolist(), abs=1e-4)


def test_top_logprobs_of_a_scored_prompt(model: Transformer) -> None:
    """In chunks, beside rows that ask for fewer or none."""
    engine = Engine(model, prefill_chunk=7)
    requests = [
        Request(SHARED, 2, GREEDY, score_from=3, top_logprobs=4),
        Request(SHARED, 2, GREEDY, score_from=0, top_logprobs=20, logprobs=True),
        Request(SHARED, 2, GREEDY, score_from=0),
    ]
    some, all_, none = run(engine, *requests)
    assert none.prompt_top_logprobs == none.top_logprobs == []
    assert [len(top) for top in some.top_logprobs] == [4, 4]
    raw = raw_scores(model, SHARED)
    for generation, first, n in ((some, 3, 4), (all_, 1, 20)):
        found = generation.prompt_top_logprobs
        assert len(found) == len(SHARED) and found[:first] == [None] * first
        for i, top in enumerate(found[first:], first):
            values, ids = raw[i - 1].topk(n)
            assert top is not None and [id for id, _ in top] == ids.tolist()
            assert [score for _, score in top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_grammar_decides_and_hears_each_id_once(model: Transformer) -> None:
    """Beside plain rows; narrower and wider than the logits; top_k above what it allows."""
    plain = Request([3], 12, GREEDY, logprobs=True)
    for width, how in ((26, GREEDY), (V, Sampling(1.0, 0.9, top_k=50)), (V + 9, Sampling(5.0))):
        grammar = Cycle(7, width)
        asked = Request([1, 2], 20, how, stop_tokens=[5], grammar=grammar)
        beside, first, second = run(Engine(model), plain, asked, asked)
        assert first.ids == second.ids == [20, 21, 22, 20, 21, 22, 20]
        assert first.finish_reason == "stop" and first.stop_token == 5
        assert [state.accepted for state in grammar.states] == [first.ids, first.ids]
        assert_as_alone(model, beside)


class Failing(Cycle):
    """Fails at an id, in one of several ways."""

    def __init__(self, how: str):
        super().__init__(99)
        self.how = how

    def start(self) -> CycleState:
        if self.how == "start":
            raise OSError("start")
        return FailingState(self)


class FailingState(CycleState):
    def allowed(self) -> torch.Tensor:
        how = self.grammar.how if len(self.accepted) == 3 else ""  # type: ignore[attr-defined]
        if how == "allowed":
            raise OSError("allowed")
        if how == "nothing":
            return torch.zeros(V, dtype=torch.bool)
        if how == "unused":
            return torch.arange(V) >= 57
        if how == "empty":
            return torch.zeros(0, dtype=torch.bool)
        if how == "type":
            return torch.ones(V)
        if how == "shape":
            return torch.ones(1, V, dtype=torch.bool)
        return super().allowed()

    def accept(self, token: int) -> None:
        if self.grammar.how == "accept" and len(self.accepted) == 2:  # type: ignore[attr-defined]
            raise OSError("accept")
        super().accept(token)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("start", "start"),
        ("allowed", "allowed"),
        ("accept", "accept"),
        ("nothing", "allows no token here"),
        ("unused", "allows no token here"),
        ("empty", "allows no token here"),
        ("type", "one dimension of bools"),
        ("shape", "one dimension of bools"),
    ],
)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8)])
def test_a_grammar_that_fails_ends_its_own_request(
    how: str, error: str, sampling: Sampling
) -> None:
    model = make_model()
    model.unused = torch.tensor([57, 58, 59])
    engine = Engine(model)
    bad = engine.add(Request([1, 2], 9, sampling, grammar=Failing(how)))
    good = engine.add(Request([1, 2], 9, sampling, seed=1))
    other = engine.add(Request([1, 2], 6, sampling, grammar=Cycle(99), logit_bias={57: 100}))
    engine.wait(lambda: not engine.busy)
    assert bad.finish_reason == "error" and error in str(bad.error)
    assert bad.ids == ([] if how == "start" else [20, 21, 22])
    assert other.ids == [20, 21, 22, 20, 21, 22] and len(good.ids) == 9
    assert engine.metrics().finished == {"error": 1, "length": 2}


def test_unused_ids_are_never_drawn_and_never_shown(model: Transformer) -> None:
    model = make_model()
    model.unused = torch.arange(10, V)
    bias = dict.fromkeys(range(10, V), 100.0)
    how = Sampling(1.5, 1.0, presence_penalty=-2.0)
    asked = Request([1], 20, how, 1, logit_bias=bias, logprobs=True, top_logprobs=20)
    [generation] = run(Engine(model), asked)
    assert len(generation.ids) == 20 and max(generation.ids) < 10
    for top in generation.top_logprobs:
        assert sorted(id for id, _ in top) == list(range(10))
        assert math.fsum(math.exp(score) for _, score in top) < 1


@pytest.mark.parametrize("where", ["engine/steering.py", "engine/drawing.py", "engine/record.py"])
def test_an_interrupt_at_any_line_keeps_grammars_and_penalties_in_step(
    model: Transformer, where: str
) -> None:
    """The state of a grammar hears each id once; after an interrupt within it a new one begins."""
    how = Sampling(0.0, presence_penalty=0.6, frequency_penalty=0.3)
    want = steered_plainly(model, Request([4, 5], 4, how), 4)
    interrupts, line = 0, 0
    while interrupts == line:
        line += 1
        engine, grammar = Engine(model), Cycle(3)
        options: dict[str, Any] = {"logprobs": True, "top_logprobs": 2}
        constrained, penalized = generations = [
            engine.add(Request([1, 2], 9, GREEDY, stop_tokens=[5], grammar=grammar, **options)),
            engine.add(Request([4, 5], 4, how, **options)),
        ]
        before = sys.gettrace()
        sys.settrace(interrupted_at(line, where))
        try:
            engine.wait(lambda engine=engine: not engine.busy)  # type: ignore[misc]
        except KeyboardInterrupt:
            interrupts += 1
        finally:
            sys.settrace(before)
        while engine.busy:
            engine.step()
        assert constrained.ids == grammar.states[-1].accepted == [20, 21, 22], line
        assert penalized.ids == want, line
        for generation in generations:
            n = len(generation.ids)
            assert len(generation.top_logprobs) == len(generation.generated_logprobs) == n
    assert interrupts > 50


def test_bad_options() -> None:
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"logit_bias": {1: 101}}, ValueError, "between -100 and 100"),
        ({"logit_bias": {1: math.nan}}, ValueError, "between -100 and 100"),
        ({"logit_bias": {1: 10**400}}, ValueError, "too large"),
        ({"logit_bias": {"1": 1}}, TypeError, "not a token id"),
        ({"logit_bias": {True: 1}}, TypeError, "not a token id"),
        ({"logit_bias": {1: "x"}}, TypeError, "must be a number"),
        ({"logit_bias": [1]}, TypeError, "must map token ids"),
        ({"top_logprobs": 21}, ValueError, "at most 20"),
        ({"top_logprobs": True}, TypeError, "an integer"),
        ({"top_logprobs": -1}, ValueError, "0 or more"),
        ({"grammar": "x"}, TypeError, "must have a method start"),
        ({"time_limit": 0}, ValueError, "more than 0"),
        ({"time_limit": math.nan}, ValueError, "more than 0"),
        ({"time_limit": "1"}, TypeError, "must be a number"),
    ]
    for options, error, message in bad:
        with pytest.raises(error, match=message):
            Request([1], **options)
    for name in ("presence_penalty", "frequency_penalty"):
        for value in (2.1, -2.1, math.nan):
            with pytest.raises(ValueError, match=f"{name} must lie between -2 and 2"):
                replace(Sampling(), **{name: value})  # type: ignore[arg-type]


def test_bias_of_ids_that_the_model_lacks(model: Transformer) -> None:
    engine = Engine(model)
    for token in (-1, V):
        with pytest.raises(ValueError, match=rf"logit_bias holds the token id {token}; ids are 0"):
            engine.add(Request([1], logit_bias={token: 1}))


def test_a_request_keeps_its_own_bias(model: Transformer) -> None:
    bias = {7: 100.0}
    request = Request([1], 3, GREEDY, logit_bias=bias)
    bias[7] = -100.0
    generations: list[Generation] = run(Engine(model), request)
    assert generations[0].ids == [7, 7, 7] and hash(request) == hash(Request([1], 3, GREEDY))
