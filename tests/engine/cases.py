"""A small model, requests, and the slow plain decoding that the engine's results must equal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from llama.engine.engine import Engine
from llama.engine.request import Generation, Request
from llama.engine.sampling import Sampling, sample
from llama.model import ModelArgs, Transformer
from tests.models import random_weights

SHAPE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 60}
SHAPE |= {"max_seq_len": 48, "max_batch_size": 3, "multiple_of": 16}
NAN = 59  # an id whose embedding a test may set to NaN; other tests do not use it
GREEDY = Sampling(0.0)
SHARED = [7, 3, 9, 9, 1, 4, 2, 8, 5, 6, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]


def make_model(**changes: Any) -> Transformer:
    args = SHAPE | changes
    model = Transformer(ModelArgs(**args))
    model.load_state_dict(random_weights(**args))
    return model.eval()


def decoded_plainly(model: Transformer, request: Request) -> tuple[list[int], list[float]]:
    """Ids and log-probabilities without cache or batch: the whole sequence again for each id."""
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


Visit = tuple[dict[str, Any], int, int | None]  # see `visits` in test_engine.py


def play(
    engine: Engine, visits: Sequence[Visit]
) -> tuple[dict[int, Generation], dict[int, list[int]]]:
    """The generations of requests that join and leave, by visit; and the ids of events, by id."""
    generations: dict[int, Generation] = {}
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
    return generations, events


def assert_as_alone(model: Transformer, *generations: Generation) -> None:
    """Compare ids and log-probabilities with plain decoding."""
    for generation in generations:
        want, scores = decoded_plainly(model, generation.request)
        assert generation.ids == want
        if generation.request.logprobs:
            assert generation.generated_logprobs == pytest.approx(scores, abs=1e-4)


def greedy(prompt: list[int], n: int, **options: Any) -> Request:
    return Request(prompt, n, GREEDY, logprobs=True, **options)


def shapes_of(monkeypatch: pytest.MonkeyPatch, model: Transformer) -> list[tuple[int, ...]]:
    """Shapes of the ids with which the model is called from now on."""
    shapes: list[tuple[int, ...]] = []
    hidden = model.hidden

    def spy(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        shapes.append(tuple(tokens.shape))
        return hidden(tokens, *args, **kwargs)

    monkeypatch.setattr(model, "hidden", spy)
    return shapes


def in_threads(jobs: list[Callable[[], object]]) -> None:
    """Run each in a thread of its own; none may fail or take over two minutes."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], object]) -> None:
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
