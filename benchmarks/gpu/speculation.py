"""Speculation of the 8B shape: what a check of several ids costs, and what prompt lookup gains.

The costs belong into the table of `llama.engine.speculation`. Random weights repeat themselves soon
when they decode greedily, so that the lookup finds what follows: an upper bound of its gain.
"""

from __future__ import annotations

import statistics

import torch

from benchmarks.gpu.decode import Decoding
from benchmarks.gpu.models import prompt, random_model
from benchmarks.gpu.record import Run
from benchmarks.gpu.timing import host_seconds
from benchmarks.speculation import decode
from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.engine.sampling import Sampling
from llama.engine.speculation import COSTS, POSITIONS, Speculation, Speculator
from llama.layers.optimize import optimize
from llama.model import Transformer

GROUPS = 5


def run(run: Run) -> None:
    """Measure costs, then gains, of eager and compiled decoding."""
    sizes = run.sizes
    room = sizes.contexts[0] + 4 * sizes.steps + 40
    model = random_model(sizes.shape, 1, room, run.device)
    optimize(model)
    run.attempt("costs", costs, run, model)
    eager, speed = run.attempt("eager engine", Engine, model), None
    if eager is not None:
        speed = run.attempt("eager gain", gain, run, eager, "eager", COSTS["gpu"])
    compiled = run.attempt("compile", Decoding(run, "bf16", model, 1.0).compiled_engine)
    if compiled is not None:
        run.attempt("compiled gain", gain, run, compiled, "compiled", COSTS["compiled"], speed)


@torch.inference_mode()
def costs(run: Run, model: Transformer) -> None:
    """Eager steps of so many positions after `contexts[0]` ids."""
    start, medians = run.sizes.contexts[0], []
    cache = model.new_cache(1, start + POSITIONS[-1])
    tokens = torch.tensor([prompt(model.vocab_size, start)], device=run.device)
    model.hidden(tokens, 0, cache)
    for n in POSITIONS:
        some = tokens.narrow(1, 0, n)

        def step(some: torch.Tensor = some) -> None:
            model.logits(model.hidden(some, start, cache)[0]).argmax(-1).tolist()

        step()
        times = host_seconds(step, run.device, GROUPS, max(1, run.sizes.steps // GROUPS))
        medians.append(statistics.median(times))
        row = f"eager, {n} position{'s' * (n > 1)}"
        run.figure(row, "step", "ms", [1e3 * t for t in times], "lower")
        run.figure(row, "relative", "", [medians[-1] / medians[0]], "lower")


def gain(
    run: Run, engine: Engine, how: str, table: tuple[float, ...], eager: float | None = None
) -> float:
    """Decode one prompt with and without prompt lookup, alternately.

    Args:
        table: the costs that decide how much is proposed.
        eager: tokens a second of eager decoding, to compare with.

    Returns:
        Tokens a second without lookup.
    """
    sizes = run.sizes
    request = Request(
        prompt(engine.model.vocab_size, sizes.contexts[0]), 3 * sizes.steps, Sampling(0.0)
    )
    ways = {"without": Speculator(None), "with": Speculator(Speculation(costs=table))}
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for i in range(GROUPS + 1):
        for way, engine.speculator in ways.items():
            answer = decode(engine, request)
            if answer.generation.error is not None:
                raise answer.generation.error
            if i:  # the first answer warms up
                speeds[way].append(1 / answer.seconds)
    for way, found in speeds.items():
        run.figure(f"{how}, {way} lookup", "decode", "tok/s", found, "higher")
    row = f"{how}, with lookup"
    run.figure(row, "proposed", "", [answer.generation.proposed])
    run.figure(row, "accepted", "", [answer.generation.accepted])
    speed = statistics.median(speeds["without"])
    if eager is not None:
        run.figure(f"{how}, without lookup", "step of eager's", "", [eager / speed], "lower")
    return speed
