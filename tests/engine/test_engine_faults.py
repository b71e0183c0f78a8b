"""Engine: NaN, lack of memory and interrupts end or repeat only what they hit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llama.engine import drawing
from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.engine.sampling import Sampling
from llama.model import Transformer
from tests.engine.cases import (
    GREEDY,
    NAN,
    SHARED,
    assert_as_alone,
    decoded_plainly,
    greedy,
    make_model,
    run,
)


def test_a_row_of_nans_fails_alone() -> None:
    model = make_model()
    with torch.no_grad():
        model.tok_embeddings.weight[NAN] = float("nan")
    engine = Engine(model)
    good = [Request([1, 2, 3], 6, GREEDY), Request([4, 5], 6, Sampling(0.8), seed=1)]
    first, bad, second = run(
        engine, good[0], Request([6, NAN, 7], 6, Sampling(0.8), seed=2), good[1]
    )
    assert bad.finish_reason == "error" and "not a number" in str(bad.error)
    assert_as_alone(model, first, second)
    with torch.no_grad():
        model.tok_embeddings.weight[NAN] = 1.0
    [same] = run(engine, greedy([6, NAN, 7], 6))
    assert same.reused == 0
    assert_as_alone(model, same)


def test_the_slot_of_a_failed_row_is_cleared() -> None:
    model = make_model()
    with torch.no_grad():
        model.tok_embeddings.weight[NAN] = float("nan")
    engine = Engine(model)
    run(engine, *(greedy([NAN, *SHARED], 6) for _ in range(3)))
    short = engine.add(greedy([8], 9))  # gets a slot full of NaNs
    engine.step()
    [long] = run(engine, greedy(SHARED, 9))  # both rows read as far as this one
    engine.wait(lambda: short.finish_reason)
    assert_as_alone(model, short, long)


def test_a_failed_step_ends_only_its_requests(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model)
    good = engine.add(Request([1, 2], 6, GREEDY))
    engine.step()
    hidden = model.hidden

    def scarce(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if tokens.shape[1] > 9:
            raise torch.OutOfMemoryError("no memory for so many")
        return hidden(tokens, *args, **kwargs)

    monkeypatch.setattr(model, "hidden", scarce)
    [big] = run(engine, Request(SHARED, 3, GREEDY))
    assert isinstance(big.error, torch.OutOfMemoryError)
    engine.wait(lambda: good.finish_reason)
    assert_as_alone(model, good)


@pytest.mark.parametrize("where", ["hidden", "logits", "chosen_logprobs"])
def test_an_interrupt_loses_nothing(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    model = make_model()
    engine = Engine(model, prefill_chunk=6)
    generations = [engine.add(request) for request in (greedy(SHARED, 5), greedy([1, 2], 9))]
    owner = drawing if where == "chosen_logprobs" else model
    function, calls = getattr(owner, where), 0

    def interrupted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        out: torch.Tensor = function(*args, **kwargs)
        if calls % 3 == 0:
            raise KeyboardInterrupt
        return out

    monkeypatch.setattr(owner, where, interrupted)
    interrupts = 0
    while engine.busy:
        try:
            engine.step()
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts > 2
    monkeypatch.undo()
    assert_as_alone(model, *generations)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError("no memory")])
def test_a_failed_copy_is_not_reused(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    model = make_model(max_batch_size=2)
    engine = Engine(model)
    [old] = run(engine, greedy([*SHARED[:18], 40, 41], 1))
    busy = engine.add(greedy(SHARED, 20))
    engine.step()
    engine.step()

    def failing(*args: Any) -> None:
        raise error

    monkeypatch.setattr(engine.cache[1], "copy_row", failing)
    beside = engine.add(greedy([*SHARED, 42], 3))
    with pytest.raises(type(error) if isinstance(error, Exception) else KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    [again] = run(engine, greedy([*SHARED[:18], 40, 43], 3))
    engine.wait(lambda: busy.finish_reason and beside.finish_reason)
    assert_as_alone(model, old, busy, beside, again)


def test_nan_scores_are_an_error() -> None:
    model = make_model()
    with torch.no_grad():
        model.tok_embeddings.weight[NAN] = float("nan")
    requests = [Request([1, NAN, 2], 0, score_from=0), Request([1, 3, 2], 0, score_from=0)]
    bad, good = run(Engine(model), *requests)
    assert bad.finish_reason == "error" and "not a number" in str(bad.error)
    assert good.finish_reason == "length" and len(good.prompt_logprobs) == 3


def test_an_interrupt_while_rows_change_places(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of the rows is then unknown: running requests fail, and nothing is reused."""
    engine = Engine(model)
    first, second = (engine.add(greedy(prompt, 9)) for prompt in ([1], SHARED))
    engine.step()
    engine.cancel(first.id)  # so that the second row moves to the first place

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.cache[1], "swap_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    [after] = run(engine, greedy([*SHARED, 4], 3))
    assert isinstance(second.error, RuntimeError) and after.reused == 0
    assert_as_alone(model, after)


def interrupted_at(line: int, where: str = "llama/engine/") -> Callable[..., Any]:
    """A trace function that raises KeyboardInterrupt at the nth line run in a folder or file."""
    left = line

    def trace(frame: Any, event: str, arg: object) -> Any:
        nonlocal left
        if where not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.parametrize("first", range(1, 8))
def test_an_interrupt_at_any_line_leaves_an_engine_that_works(
    model: Transformer, first: int
) -> None:
    """Nothing of the interrupted call runs on, and no id or score is lost, doubled or wrong."""
    engine, requests = (
        Engine(model, prefill_chunk=8),
        [greedy(SHARED, 3, score_from=0), greedy([1, 2], 4)],
    )
    want = [decoded_plainly(model, request)[0] for request in requests]
    interrupts = 0
    for line in range(first, 1400, 7 * 5):
        before = sys.gettrace()
        sys.settrace(interrupted_at(line))
        try:
            engine.run(requests)
        except KeyboardInterrupt:
            interrupts += 1
        finally:
            sys.settrace(before)
        for _ in range(3):  # what the interrupt kept from being recorded is recorded
            engine.step()
        assert not engine.busy, line
        again = engine.run(requests)
        assert [g.ids for g in again] == want, line
        assert [len(g.generated_logprobs) for g in again] == [3, 4]
        assert len(again[0].prompt_logprobs) == len(SHARED)
    assert interrupts > 20


def test_an_interrupt_while_requests_come_and_go(model: Transformer) -> None:
    """At every line of adding and cancelling: what is left in the engine runs to its end."""
    engine, interrupts, line = Engine(model), 0, 0
    want, _ = decoded_plainly(model, greedy([1, 2], 2))
    while interrupts == line:
        line += 1
        before = sys.gettrace()
        sys.settrace(interrupted_at(line))
        try:
            first, _ = engine.add(greedy([3], 2)), engine.add(greedy([4, 5], 2))
            engine.cancel(first.id)
        except KeyboardInterrupt:
            interrupts += 1
        finally:
            sys.settrace(before)
        for _ in range(10):
            if engine.busy:
                engine.step()
        assert not engine.busy, line
        [after] = engine.run([greedy([1, 2], 2)])
        assert after.ids == want, line
    assert interrupts > 50


def test_an_id_is_never_seen_without_its_logprob(model: Transformer) -> None:
    seen = []

    class Tokens(list[int]):
        def append(self, token: int) -> None:
            seen.append(len(generation.generated_logprobs) - len(generation.ids))
            super().append(token)

    engine = Engine(model)
    generation = engine.add(greedy([1, 2], 5))
    generation.tokens = Tokens(generation.tokens)
    engine.wait(lambda: generation.finish_reason)
    assert seen == [1] * 5


def test_closed_engines_refuse_everything_and_may_be_closed_again(model: Transformer) -> None:
    engine = Engine(model)
    engine.close()
    engine.close()
    for call in (lambda: engine.add(greedy([1], 1)), engine.step):
        with pytest.raises(RuntimeError, match="this engine is closed; build another Llama"):
            call()


def test_compile_only_before_the_first_request(model: Transformer) -> None:
    engine = Engine(model)
    run(engine, greedy([1, 2], 2))
    with pytest.raises(RuntimeError, match="before the first request"):
        engine.compile()


def test_a_model_that_was_moved_is_refused_by_name() -> None:
    """Its cache has the old dtype; a new engine has the new one."""
    model = make_model()
    engine = Engine(model)
    run(engine, greedy([1, 2, 3], 2))
    model.to(torch.bfloat16)
    [failed] = run(engine, greedy([1, 2, 3], 2))
    assert isinstance(failed.error, RuntimeError)
    assert "moved to torch.bfloat16 on cpu, and its cache is torch.float32" in str(failed.error)
    [generation] = run(Engine(model), greedy([1, 2, 3], 2))
    assert len(generation.ids) == 2
