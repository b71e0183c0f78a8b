"""The engine under load: many requests of mixed length that share the rows of its cache."""

from __future__ import annotations

import random
import statistics
import time

from benchmarks.gpu.decode import check
from benchmarks.gpu.models import prompt, random_model
from benchmarks.gpu.record import Run
from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.engine.sampling import Sampling
from llama.layers.optimize import optimize

WAYS = {
    "greedy": (Sampling(0.0), False),
    "temperature 0.6, top_p 0.9": (Sampling(0.6, 0.9), False),
    "temperature 0.6, top_p 0.9, each with a seed": (Sampling(0.6, 0.9), True),
}


def run(run: Run) -> None:
    """All requests are added at once; greedy, sampled, and sampled with a seed each."""
    sizes = run.sizes
    room = sizes.prompt_lengths[1] + sizes.answer_lengths[1]
    model = random_model(sizes.shape, sizes.slots, room, run.device)
    optimize(model)
    engine = Engine(model)
    if not engine.compile():
        run.failed("compile", "not compiled; the figures are of eager steps")
    run.attempt("first run", measure, run, engine, "greedy, the first run", Sampling(0.0), False)
    for way, (sampling, seeded) in WAYS.items():
        run.attempt(way, measure, run, engine, way, sampling, seeded)
    run.peak_memory(f"{sizes.slots} rows")


def make_requests(run: Run, sampling: Sampling, seeded: bool) -> list[Request]:
    """The same lengths and prompts at every call."""
    sizes, rng = run.sizes, random.Random(3)
    requests = []
    for i in range(sizes.requests):
        ids = prompt(sizes.shape["vocab_size"], rng.randint(*sizes.prompt_lengths), i)
        new = rng.randint(*sizes.answer_lengths)
        requests.append(Request(ids, new, sampling, i if seeded else None, reuse=False))
    return requests


def serve(engine: Engine, requests: list[Request]) -> tuple[float, list[float], int]:
    """(seconds until all have ended, seconds until each one's first id, ids generated)."""
    start = time.perf_counter()
    waiting = generations = [engine.add(request) for request in requests]
    first: list[float] = []
    while any(generation.finish_reason is None for generation in generations):
        engine.step()
        now = time.perf_counter() - start
        begun = [generation for generation in waiting if generation.ids]
        first += [now] * len(begun)
        waiting = [generation for generation in waiting if not generation.ids]
    seconds = time.perf_counter() - start
    check(generations)
    return seconds, first, sum(len(generation.ids) for generation in generations)


def measure(run: Run, engine: Engine, way: str, sampling: Sampling, seeded: bool) -> None:
    requests = make_requests(run, sampling, seeded)
    seconds, first, ids = serve(engine, requests)
    prompts = sum(len(request.prompt) for request in requests)
    row = f"{len(requests)} requests, {way}"
    run.figure(row, "output", "tok/s", [ids / seconds], "higher")
    run.figure(row, "prompts + output", "tok/s", [(ids + prompts) / seconds], "higher")
    run.figure(row, "first token, median", "s", [statistics.median(first)], "lower")
    p95 = sorted(first)[int(0.95 * (len(first) - 1))]
    run.figure(row, "first token, p95", "s", [p95], "lower")
