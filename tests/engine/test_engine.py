"""Every request gets what it would get alone, whatever runs beside it."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama.engine import forward
from llama.engine.engine import Engine
from llama.engine.request import Generation, Request
from llama.engine.sampling import Sampling, sample
from llama.model import ModelArgs, Transformer
from tests.models import random_weights

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 60}
SHAPE |= {"max_seq_len": 48, "max_batch_size": 3, "multiple_of": 16}
NAN = 59  # an id whose embedding a test may spoil; the others do not draw it
GREEDY = Sampling(0.0)


def make_model(**changes: Any) -> Transformer:
    args = SHAPE | changes
    model = Transformer(ModelArgs(**args))
    model.load_state_dict(random_weights(**args))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_model()


def by_hand(model: Transformer, request: Request) -> tuple[list[int], list[float]]:
    """No cache, no batch: the whole sequence through the model for each id."""
    ids, scores = [*request.prompt], []
    generator = None
    if request.seed is not None:
        generator = torch.Generator().manual_seed(request.seed)
    room = SHAPE["max_seq_len"] - len(ids)
    for _ in range(room if request.max_gen_len is None else min(room, request.max_gen_len)):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[:, -1]
        token = int(sample(logits, request.sampling, [generator] if generator else None))
        if token in request.stop_tokens:
            break
        ids.append(token)
        scores.append(float(torch.log_softmax(logits, -1)[0, token]))
    return ids[len(request.prompt) :], scores


def run(engine: Engine, *requests: Request) -> list[Generation]:
    generations = [engine.add(request) for request in requests]
    engine.wait(lambda: all(g.finish_reason for g in generations))
    return generations


def assert_right(model: Transformer, *generations: Generation) -> None:
    """Ids as by hand; log-probabilities too, which show what argmax forgives."""
    for generation in generations:
        want, scores = by_hand(model, generation.request)
        assert generation.ids == want
        if generation.request.logprobs:
            assert generation.generated_logprobs == pytest.approx(scores, abs=1e-4)


SHARED = [7, 3, 9, 9, 1, 4, 2, 8, 5, 6, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
ids = st.integers(0, NAN - 1)
prompts = st.builds(
    lambda shared, own: SHARED[:shared] + own,
    st.integers(0, len(SHARED)),
    st.lists(ids, min_size=1, max_size=28),
)
asked = st.builds(
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
# A request, the step before which it joins, and the step before which it is cancelled.
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
def test_joins_leaves_and_cancels_do_not_show(
    model: Transformer, visits: list[tuple[dict[str, Any], int, int | None]], chunk: int
) -> None:
    engine = Engine(model, chunk)
    generations: dict[int, Generation] = {}  # by the visit's number
    events: dict[int, list[int]] = {}
    for step in range(1000):
        for i, (asked, joins, leaves) in enumerate(visits):
            if step == joins:
                generations[i] = engine.add(Request(**asked))
                events[generations[i].id] = []
            if step == leaves and joins < step:
                engine.cancel(generations[i].id)
        for event in engine.step():
            if event.token is not None:
                events[event.id].append(event.token)
        if step > 20 and not engine.busy:
            break
    assert len(generations) == len(visits)
    for generation in generations.values():
        request = generation.request
        want, scores = by_hand(model, request)
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


def shapes_of(monkeypatch: pytest.MonkeyPatch, model: Transformer) -> list[tuple[int, ...]]:
    """What the model is called with from now on."""
    shapes: list[tuple[int, ...]] = []
    hidden = model.hidden

    def spy(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return hidden(tokens, *args, **kwargs)

    monkeypatch.setattr(model, "hidden", spy)
    return shapes


def greedy(prompt: list[int], n: int, **options: Any) -> Request:
    return Request(prompt, n, GREEDY, logprobs=True, **options)


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
    assert_right(model, *done)


def test_a_prefix_is_copied_from_a_busy_slot_and_from_one_worth_keeping() -> None:
    model = make_model()  # whose cache is empty
    engine = Engine(model)
    busy = engine.add(greedy(SHARED, 20))
    engine.step()
    [beside] = run(engine, greedy([*SHARED, 40], 3))
    assert beside.reused == len(SHARED)
    engine.wait(lambda: busy.finish_reason)
    # The long cached row keeps what it has: half its ids are not of this prompt.
    [short] = run(engine, greedy([*SHARED[:16], 41], 3))
    [longer] = run(engine, greedy([*busy.tokens, 42], 2))
    assert short.reused == 16 and longer.reused == len(busy.tokens) - 1
    assert_right(model, busy, beside, short, longer)


def test_padding_stays_within_the_cache(model: Transformer) -> None:
    engine = Engine(model)
    [first] = run(engine, greedy(list(range(44)), 1))
    at_the_end, beside = run(engine, greedy([*range(44), 50], 2), greedy(SHARED, 2))
    assert at_the_end.reused == 44
    assert_right(model, first, at_the_end, beside)


def test_a_long_prompt_comes_in_chunks_and_holds_nobody_up(
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
    assert not long.ids and len(talking.ids) >= 4  # the long one is still reading
    engine.wait(lambda: long.finish_reason and talking.finish_reason)
    assert max(rows * width for rows, width in shapes) <= 8
    assert_right(model, talking, long, short)


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
    assert_right(model, good)
    with pytest.raises(RuntimeError, match="no request is left"):
        engine.wait(lambda: False)
    with pytest.raises(ValueError, match="prefill_chunk"):
        Engine(model, 0)


def test_a_request_checks_itself_and_never_changes() -> None:
    with pytest.raises(ValueError, match="max_gen_len"):
        Request([1], -1)
    for options, error in [
        ({"seed": "x"}, "seed"),
        ({"sampling": None}, "sampling"),
        ({"stop_tokens": None}, "stop_tokens"),
        ({"score_from": "a"}, "score_from"),
        ({"max_gen_len": 1.5}, "max_gen_len"),
        ({"prompt": "text"}, "must be a list of token ids"),
        ({"prompt": [1, True]}, "holds True"),
    ]:
        with pytest.raises(TypeError, match=error):
            Request(**{"prompt": [1], **options})  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Request([1]).seed = 3  # type: ignore[misc]


def test_a_request_may_run_again(model: Transformer) -> None:
    engine, request = Engine(model), Request([1, 2], 5, Sampling(0.9), seed=4)
    first, second = run(engine, request, request)
    assert first.id != second.id and first.ids == second.ids == by_hand(model, request)[0]


def test_a_row_that_is_not_a_number_fails_alone() -> None:
    model = make_model()
    with torch.no_grad():
        model.tok_embeddings.weight[NAN] = float("nan")
    engine = Engine(model)
    good = [Request([1, 2, 3], 6, GREEDY), Request([4, 5], 6, Sampling(0.8), seed=1)]
    first, bad, second = run(
        engine, good[0], Request([6, NAN, 7], 6, Sampling(0.8), seed=2), good[1]
    )
    assert bad.finish_reason == "error" and "not a number" in str(bad.error)
    assert_right(model, first, second)
    with torch.no_grad():
        model.tok_embeddings.weight[NAN] = 1.0
    [same] = run(engine, greedy([6, NAN, 7], 6))
    assert same.reused == 0
    assert_right(model, same)


def test_nothing_of_a_failed_row_is_left_in_its_slot() -> None:
    model = make_model()
    with torch.no_grad():
        model.tok_embeddings.weight[NAN] = float("nan")
    engine = Engine(model)
    run(engine, *(greedy([NAN, *SHARED], 6) for _ in range(3)))
    short = engine.add(greedy([8], 9))  # takes a slot full of NaNs
    engine.step()
    [long] = run(engine, greedy(SHARED, 9))  # and reads as far as this one
    engine.wait(lambda: short.finish_reason)
    assert_right(model, short, long)


def test_a_pass_that_fails_ends_those_in_it(
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
    assert_right(model, good)


@pytest.mark.parametrize("where", ["hidden", "logits", "chosen_logprobs"])
def test_an_interrupt_loses_nothing(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    model = make_model()
    engine = Engine(model, prefill_chunk=6)
    generations = [engine.add(request) for request in (greedy(SHARED, 5), greedy([1, 2], 9))]
    owner = forward if where == "chosen_logprobs" else model
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
    assert_right(model, *generations)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError("no memory")])
def test_a_copy_that_fails_is_not_built_upon(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
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
    assert_right(model, old, busy, beside, again)


def test_forget_counts_for_those_that_run(model: Transformer) -> None:
    engine = Engine(model)
    running = engine.add(greedy(SHARED, 5))
    engine.step()
    engine.forget()
    [beside] = run(engine, greedy([*SHARED, 1], 2))
    engine.wait(lambda: running.finish_reason)
    [after] = run(engine, greedy([*SHARED, 2], 2))
    assert beside.reused == 0 and after.reused == len(SHARED)  # of `beside`, which came later
    assert_right(model, running, beside, after)


def test_the_callers_lists_are_its_own(model: Transformer) -> None:
    engine, prompt, stops = Engine(model), [1, 2, 3], {58}
    generation = engine.add(Request(prompt, 6, GREEDY, stop_tokens=stops))
    while engine.busy:
        for event in engine.step():
            prompt.append(event.token or 0)
            stops.add(event.token or 0)
    assert generation.ids == by_hand(model, Request([1, 2, 3], 6, GREEDY))[0] == prompt[3:]


def test_run_reads_between_steps_and_ends_what_it_began(model: Transformer) -> None:
    """`after_step` sees one id more each time; it may cancel; an error in it cancels the rest."""
    engine, seen = Engine(model), []

    def after_step(generations: Sequence[Generation]) -> None:
        seen.append([len(g.ids) for g in generations])
        if len(generations[0].ids) == 2:
            engine.cancel(generations[0].id)

    requests = [Request([1, 2], 9, GREEDY), Request([3], 4, GREEDY), Request([60])]
    first, second, refused = engine.run(requests, after_step)
    assert seen == [[1, 1, 0], [2, 2, 0], [2, 3, 0], [2, 4, 0]]
    assert first.finish_reason == "cancelled" and second.ids == by_hand(model, requests[1])[0]
    assert refused.finish_reason == "error" and "ids are 0 to 59" in str(refused.error)
    with pytest.raises(ZeroDivisionError):
        engine.run(requests, lambda _: 1 / 0)
    assert not engine.busy


def test_close_cancels_and_refuses(model: Transformer) -> None:
    engine = Engine(model)
    running, cache = engine.add(Request([1, 2], 9, GREEDY)), weakref.ref(engine.cache[0].k)
    engine.step()
    engine.close()
    assert running.finish_reason == "cancelled" and len(running.ids) == 1 and not engine.busy
    assert cache() is None and not hasattr(engine, "model")
    with pytest.raises(RuntimeError, match="closed"):
        engine.add(Request([1]))


def test_scores_that_are_no_numbers_are_an_error() -> None:
    model = make_model()
    with torch.no_grad():
        model.tok_embeddings.weight[NAN] = float("nan")
    requests = [Request([1, NAN, 2], 0, score_from=0), Request([1, 3, 2], 0, score_from=0)]
    bad, good = run(Engine(model), *requests)
    assert bad.finish_reason == "error" and "not a number" in str(bad.error)
    assert good.finish_reason == "length" and len(good.prompt_logprobs) == 3


def test_a_cache_shorter_than_the_model(model: Transformer) -> None:
    engine = Engine(model, max_seq_len=24)
    [generation] = run(engine, Request(SHARED, None, GREEDY))
    assert len(generation.ids) == 4 and generation.finish_reason == "length"
    with pytest.raises(ValueError, match="max_seq_len 24"):
        engine.add(Request([1] * 25))


def test_the_models_own_cache_and_other_engines_do_not_disturb(model: Transformer) -> None:
    engine, other = Engine(model), Engine(model)
    [kept] = run(engine, greedy(SHARED, 4))
    running = engine.add(greedy([3, 2, 1], 9))
    engine.step()
    model(torch.randint(0, 50, (3, 40)), 0)
    run(other, greedy([5] * 40, 4))
    [after] = run(engine, greedy([*kept.tokens, 5], 4))
    engine.wait(lambda: running.finish_reason)
    assert after.reused == len(kept.tokens) - 1
    assert_right(model, kept, running, after)


def test_an_interrupt_while_rows_change_places(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is in an unknown order then: what ran ends with an error, and nothing is reused."""
    engine = Engine(model)
    first, second = (engine.add(greedy(prompt, 9)) for prompt in ([1], SHARED))
    engine.step()
    engine.cancel(first.id)  # so that the second row moves to the first

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.cache[1], "swap_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    [after] = run(engine, greedy([*SHARED, 4], 3))
    assert isinstance(second.error, RuntimeError) and after.reused == 0
    assert_right(model, after)


def in_threads(jobs: list[Callable[[], None]]) -> None:
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert not errors


def test_threads_share_one_engine(model: Transformer) -> None:
    engine = Engine(model, prefill_chunk=8)
    requests = [Request(SHARED[: i + 1], 10, Sampling(0.9), seed=i) for i in range(12)]

    done: list[Generation] = []

    def job(mine: list[Request]) -> Callable[[], None]:
        return lambda: [done.extend(run(engine, request)) for request in mine] and None

    in_threads([job(requests[i::4]) for i in range(4)])
    assert len(done) == 12 and not engine.busy
    assert_right(model, *done)


def test_cancel_from_another_thread_in_mid_step(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model)
    first, second = (engine.add(Request([i, 1], 9, GREEDY)) for i in range(2))
    hidden = model.hidden

    def spy(*args: Any, **kwargs: Any) -> torch.Tensor:
        if len(second.ids) == 3:
            in_threads([lambda: engine.cancel(first.id) and None])
        return hidden(*args, **kwargs)

    monkeypatch.setattr(model, "hidden", spy)
    engine.wait(lambda: second.finish_reason)
    assert first.finish_reason == "cancelled" and len(first.ids) == 3
    assert_right(model, second)


def test_unseeded_rows_draw_from_the_global_generator(model: Transformer) -> None:
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        engine = Engine(model)
        mixed = [Request([1, 2], 8, Sampling(1.0)), Request([3], 8, Sampling(1.0), seed=5)]
        runs.append([g.ids for g in run(engine, *mixed)])
    assert runs[0] == runs[1] and runs[0][0] != runs[2][0] and runs[0][1] == runs[2][1]
