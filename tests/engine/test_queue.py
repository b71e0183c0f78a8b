"""The bounded queue, its order, time limits, and counts that always agree."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from threading import Event
from time import monotonic, sleep
from typing import Any

import pytest

from llama.common.errors import QueueFull
from llama.engine.engine import Engine
from llama.engine.metrics import EngineMetrics
from llama.engine.request import Generation, Request
from llama.engine.sampling import Sampling
from llama.model import Transformer
from tests.engine.cases import GREEDY, SHARED, assert_as_alone, in_threads, run


def test_the_queue_is_full(model: Transformer) -> None:
    """Three slots and two places: the sixth is refused until one has ended."""
    engine = Engine(model, max_queue=2)
    request = Request([1, 2], 9, GREEDY)
    generations = [engine.add(request) for _ in range(5)]
    for _ in range(3):
        with pytest.raises(QueueFull, match="2 requests wait already; try again later"):
            engine.add(request)
        assert engine.waiting == 2
        engine.step()
    engine.cancel(generations[4].id)
    assert engine.waiting == 1
    generations.append(engine.add(request))
    engine.cancel(generations[0].id)
    assert engine.waiting == 1  # one of them has the slot that became free
    engine.wait(lambda: not engine.busy)
    assert engine.metrics().finished == {"cancelled": 2, "length": 4}
    assert [len(g.ids) for g in generations] == [3, 9, 9, 9, 0, 9]


def test_no_place_in_the_queue_leaves_the_slots(model: Transformer) -> None:
    engine = Engine(model, max_queue=0)
    for _ in range(3):
        engine.add(Request([1], 4, GREEDY))
    with pytest.raises(QueueFull):
        engine.add(Request([1], 4, GREEDY))
    for bad in (-1, True, "x"):
        with pytest.raises((TypeError, ValueError), match="max_queue"):
            Engine(model, max_queue=bad)  # type: ignore[arg-type]


def test_first_come_first_served(model: Transformer) -> None:
    """Siblings keep their place: who came later does not pass them."""
    engine, order = Engine(model, prefill_chunk=5), list[int]()
    groups = [[Generation(Request([i, *SHARED], 3, GREEDY)) for _ in range(2)] for i in range(3)]
    expected: list[Generation] = []
    for i, group in enumerate(groups):
        expected.append(engine.add(Request([50 + i], 1 + i, GREEDY)))
        engine.queue_siblings(group)
        expected += group
    while engine.busy:
        engine.step()
        placed = [g for g in expected if g.placed_at is not None and g.id not in order]
        order += [g.id for g in sorted(placed, key=lambda g: g.placed_at or 0.0)]
    assert order == [g.id for g in expected]


def test_a_time_limit_ends_running_and_waiting_requests(model: Transformer) -> None:
    engine = Engine(model)
    limited = [engine.add(Request([1, 2], 40, GREEDY, time_limit=0.2)) for _ in range(4)]
    free = engine.add(Request([3, 4], 5, GREEDY, logprobs=True))
    first = engine.step()
    assert {event.id for event in first} == {g.id for g in limited[:3]}
    sleep(max(0.0, (limited[-1].queued_at or 0.0) + 0.21 - monotonic()))
    ended = [event for event in engine.step() if event.finish_reason == "timeout"]
    assert {event.id for event in ended} == {g.id for g in limited}
    assert [len(g.ids) for g in limited] == [1, 1, 1, 0]
    engine.wait(lambda: not engine.busy)
    assert_as_alone(model, free)
    assert engine.metrics().finished == {"timeout": 4, "length": 1}
    assert len(run(engine, Request([1, 2], 9, GREEDY, time_limit=1e9))[0].ids) == 9


def test_times_of_a_generation(model: Transformer) -> None:
    engine = Engine(model, prefill_chunk=5)
    generation = Generation(Request(SHARED, 4, GREEDY))
    assert generation.queued_at is None and generation.ended_at is None
    start = monotonic()
    engine.queue(generation)
    assert generation.queued_at is not None and generation.placed_at is None
    engine.step()
    assert generation.placed_at is not None and generation.first_id_at is None
    engine.wait(lambda: generation.finish_reason)
    times: list[Any] = [start, generation.queued_at, generation.placed_at]
    times += [generation.first_id_at, generation.ended_at, monotonic()]
    assert times == sorted(times)
    waiting = engine.add(Request([1], 3))
    engine.cancel(waiting.id)
    assert waiting.placed_at is None and waiting.ended_at is not None


def test_metrics_count_what_was_done(model: Transformer) -> None:
    engine = Engine(model, prefill_chunk=64)
    assert engine.metrics() == EngineMetrics(slots=3)
    run(engine, Request(SHARED, 4, GREEDY))
    run(engine, Request([*SHARED, 30], 3, GREEDY), Request([5], 0), Request([5, 6], 1, reuse=False))
    now = engine.metrics()
    assert (now.prompt_tokens, now.cached_tokens, now.generated_tokens) == (20 + 21 + 2, 20, 8)
    assert now.finished == {"length": 4} and now.requests == 4 and now.steps == engine.steps
    assert now.prefill_seconds > 0 and now.decode_seconds > 0
    for _ in range(5):
        engine.add(Request([1], 9))
    engine.step()
    now = engine.metrics()
    assert (now.waiting, now.running, now.slots) == (2, 3, 3)
    engine.close()
    now = engine.metrics()
    assert now.finished == {"length": 4, "cancelled": 5} and now.requests == 9
    assert now.generated_tokens == 11


@pytest.mark.parametrize("seed", range(3))
def test_a_burst_of_threads_never_passes_the_limit(model: Transformer, seed: int) -> None:
    """Groups come, end, are cancelled and time out, while others count."""
    engine, limit = Engine(model, prefill_chunk=16, max_queue=4), 4
    accepted: list[Generation] = []
    refused, ended = [0], list[int]()

    def client(number: int) -> None:
        try:
            ask(number)
        finally:
            ended.append(number)

    def ask(number: int) -> None:
        rng = random.Random(seed * 100 + number)
        for _ in range(8):
            n, size = rng.choice([1, 1, 2, 4]), rng.randint(1, 20)
            fields: dict[str, Any] = {"sampling": Sampling(0.9), "logprobs": True}
            fields |= {"time_limit": rng.choice([None, None, 1e-3]), "reuse": rng.random() < 0.5}
            prompt, length = SHARED[:size], rng.randint(0, 8)
            group = [Generation(Request(prompt, length, seed=j, **fields)) for j in range(n)]
            try:
                engine.queue_siblings(group)
            except QueueFull:
                refused[0] += 1
                sleep(0.001)
                continue
            accepted.extend(group)
            for generation in group:
                if rng.random() < 0.3:
                    engine.cancel(generation.id)
            engine.wait(lambda group=group: all(g.finish_reason for g in group))  # type: ignore[misc]

    def count() -> None:
        past = 0
        while len(ended) < 8:
            assert engine.waiting <= limit
            now = engine.metrics()
            assert now.waiting <= limit and now.running <= 3 and now.requests >= past
            past = now.requests
            sleep(0.0005)

    in_threads([count, *(partial(client, number) for number in range(8))])
    now = engine.metrics()
    assert now.requests == len(accepted) and (now.waiting, now.running) == (0, 0)
    assert now.finished == Counter(g.finish_reason for g in accepted)
    assert now.generated_tokens == sum(len(g.ids) for g in accepted)
    placed = [g for g in accepted if g.placed_at is not None]
    assert now.prompt_tokens == sum(len(g.request.prompt) for g in placed)
    assert now.cached_tokens == sum(g.reused for g in placed)
    assert_as_alone(model, *(g for g in accepted if g.finish_reason in ("length", "stop")))
    assert refused[0]


def test_a_row_is_copied_without_the_lock(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long one takes a while, and a server queues and cancels in its event loop."""
    engine, copied, done, waited = Engine(model), Event(), Event(), list[bool]()
    group = [Generation(Request(SHARED, 3, GREEDY)) for _ in range(3)]
    copy_row = engine.cache[0].copy_row

    def slow_copy(source: int, target: int, length: int) -> None:
        copied.set()
        waited.append(done.wait(5))
        copy_row(source, target, length)

    def ask() -> None:
        assert copied.wait(60)
        engine.cancel(group[2].id)
        engine.cancel(engine.add(Request([1], 2)).id)
        assert engine.metrics().finished == {"cancelled": 2}
        done.set()

    monkeypatch.setattr(engine.cache[0], "copy_row", slow_copy)
    engine.queue_siblings(group)
    in_threads([lambda: engine.wait(lambda: not engine.busy), ask])
    assert waited and all(waited)
    assert engine.metrics().finished == {"length": 2, "cancelled": 2}
    assert_as_alone(model, *group[:2])
