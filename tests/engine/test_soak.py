"""Many requests from many threads, some cancelled: each answer is that of its request alone."""

from __future__ import annotations

import random
from functools import partial

import pytest

from llama.engine.engine import Engine
from llama.engine.request import Generation, Request
from llama.engine.sampling import Sampling
from tests.engine.cases import SHARED, decoded_plainly, in_threads, make_model

THREADS, REQUESTS, SEED = 8, 250, 0  # requests of each thread


def random_request(rng: random.Random) -> Request:
    """A prompt that often begins as others do, greedy or seeded."""
    prompt = SHARED[: rng.randrange(1, 20)] + [rng.randrange(59) for _ in range(rng.randrange(3))]
    how = rng.choice([Sampling(0.0), Sampling(0.9, 0.9), Sampling(1.2)])
    stop = frozenset(rng.sample(range(59), rng.randrange(4)))
    return Request(prompt, rng.randrange(1, 12), how, seed=rng.randrange(9), stop_tokens=stop)


@pytest.mark.slow
def test_soak() -> None:
    rng = random.Random(SEED)
    model = make_model()
    engine = Engine(model, prefill_chunk=8)
    requests = [random_request(rng) for _ in range(100)]
    expected = [decoded_plainly(model, request)[0] for request in requests]
    done: list[tuple[int, Generation]] = []

    def use(rng: random.Random) -> None:
        for _ in range(REQUESTS):
            number = rng.randrange(len(requests))
            generation = engine.add(requests[number])
            done.append((number, generation))
            steps = rng.choice([0, 1, 3, 99, 99, 99])
            for _ in range(steps):
                if generation.finish_reason is None:
                    engine.step()
            if generation.finish_reason is None and rng.random() < 0.9:
                engine.cancel(generation.id)
            else:
                engine.wait(partial(getattr, generation, "finish_reason"))

    in_threads([partial(use, random.Random(i)) for i in range(THREADS)])
    assert len(done) == THREADS * REQUESTS and not engine.busy
    reasons = {"cancelled": 0}
    for number, generation in done:
        reason = str(generation.finish_reason)
        reasons[reason] = reasons.get(reason, 0) + 1
        if reason == "cancelled":
            assert generation.ids == expected[number][: len(generation.ids)]
        else:
            assert generation.ids == expected[number]
    assert len(reasons) >= 3 and min(reasons.values()) > 50, reasons
    again = engine.add(requests[0])
    engine.wait(lambda: again.finish_reason)
    assert again.ids == expected[0]
