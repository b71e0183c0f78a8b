"""Decoding of the 8B shape: batches, contexts, eager and compiled, in one of three weight formats.

A step is timed as the engine makes it, with all that happens on the host. Where the step is one
CUDA graph or several, they are also replayed alone.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

import torch

from benchmarks.gpu.ceilings import copy_ceiling
from benchmarks.gpu.models import cache_read, prompt, random_model, weights_read
from benchmarks.gpu.profiling import profile
from benchmarks.gpu.record import Run
from benchmarks.gpu.timing import host_seconds, replays_seen, seconds_of, wait
from llama.engine.engine import Engine
from llama.engine.request import Generation, Request
from llama.engine.sampling import Sampling
from llama.layers.optimize import optimize, quantize_model
from llama.model import Transformer

QUANTIZE = {"bf16": None, "int8": "int8", "int4": "int4"}
GROUPS = 5  # of steps; each gives a run of the figure


def run(run: Run, scheme: str) -> None:
    """Measure compiled decoding in order of worth, and eager decoding of bf16."""
    sizes, device = run.sizes, run.device
    room = max(sizes.contexts) + 3 * sizes.steps + 60
    start = time.perf_counter()
    model = random_model(sizes.shape, max(sizes.rows), room, device)
    made = time.perf_counter() - start
    quantize_model(model, QUANTIZE[scheme])
    optimize(model)
    wait(device)
    run.figure(scheme, "make weights", "s", [made], "lower")
    run.figure(scheme, "optimize", "s", [time.perf_counter() - start - made], "lower")
    run.figure(scheme, "weights read", "GB", [weights_read(model) / 1e9], "lower")
    ceiling = copy_ceiling(run, scheme)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    measure = Decoding(run, scheme, model, ceiling)
    compiled = run.attempt("compiled", measure.compiled_engine)
    short, *longer = sizes.contexts
    measure.attempt(compiled, "compiled", 1, short)
    if scheme == "bf16":
        eager = run.attempt("eager", Engine, model, 512, short + 4 * sizes.steps + 40)
        measure.attempt(eager, "eager", 1, short)
        del eager
    for rows in sizes.rows[1:]:
        measure.attempt(compiled, "compiled", rows, short)
    for context in longer:
        for rows in sizes.rows:
            measure.attempt(compiled, "compiled", rows, context)
    run.peak_memory(scheme)
    if compiled is not None:
        run.attempt("profile", measure.profile, compiled, short)


class Decoding:
    """Timed decoding steps of a model; all figures go to `run`."""

    def __init__(self, run: Run, scheme: str, model: Transformer, ceiling: float):
        self.run, self.scheme, self.model, self.ceiling = run, scheme, model, ceiling
        self.seed = 0

    def compiled_engine(self) -> Engine:
        """An engine with a compiled step.

        Raises:
            RuntimeError: it cannot be compiled.
        """
        engine = Engine(self.model)
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if not engine.compile():
                raise RuntimeError(str(caught[-1].message) if caught else "not compiled")
        for each in caught:
            self.run.note(f"{self.scheme}: {each.message}")
        seconds = time.perf_counter() - start
        self.run.figure(self.scheme, "compile", "s", [seconds], "lower")
        return engine

    def attempt(self, engine: Engine | None, how: str, rows: int, context: int) -> None:
        """Measure, if there is an engine, or keep the reason why not."""
        row = f"{self.scheme} {how}, batch {rows}, context {context}"
        if engine is not None:
            self.run.attempt(row, self.measure, engine, row, rows, context)

    def measure(self, engine: Engine, row: str, rows: int, context: int) -> None:
        """Steps of `rows` requests after `context` ids each."""
        steps = self.run.sizes.steps
        per_run = max(1, steps // GROUPS)
        budget = steps + 3 * per_run + 8
        self.begin(engine, rows, context, budget)
        for _ in range(4):
            engine.step()
        wait(self.run.device)
        with replays_seen() as graphs:

            def step() -> None:
                graphs.clear()
                engine.step()

            times = host_seconds(step, self.run.device, GROUPS, per_run)
        self.report(row, "engine step", times, rows, context)
        last = list(graphs)
        if last:

            def replay() -> None:
                for graph in last:
                    graph.replay()

            times = seconds_of(replay, self.run.device, GROUPS, per_run, warm=0)
            self.report(row, "graph alone", times, rows, context)
        self.end(engine)

    def begin(self, engine: Engine, rows: int, context: int, budget: int) -> None:
        """Start `rows` requests, and step until all of them decode.

        All have the same prompt: the first computes it, and the others copy what it has cached.
        """
        self.seed += 1
        ids = prompt(self.model.vocab_size, context, self.seed)
        request = Request(ids, budget, Sampling(0.0))
        generations = [engine.add(request)]
        while not generations[0].ids:
            engine.step()
            check(generations)
        generations += [engine.add(request) for _ in range(rows - 1)]
        while not all(generation.ids for generation in generations):
            engine.step()
            check(generations)
        self.ids = [generation.id for generation in generations]

    def end(self, engine: Engine) -> None:
        for id in self.ids:
            engine.cancel(id)
        engine.forget()

    def report(self, row: str, what: str, times: list[float], rows: int, context: int) -> None:
        """Ids a second, and the bandwidth of a step relative to that of copying."""
        dtype = self.model.norm.weight.dtype
        size = weights_read(self.model)
        size += cache_read(self.model.params, rows, context, dtype)
        self.run.figure(row, what, "tok/s", [rows / t for t in times], "higher")
        shares = [size / t / 1e9 / self.ceiling for t in times]
        self.run.figure(row, f"{what}, of copy", "", shares, "higher")

    def profile(self, engine: Engine, context: int, steps: int = 5) -> None:
        """Where the device's time goes in a step of one row."""
        self.begin(engine, 1, context, steps + 10)
        profile(self.run, f"{self.scheme}, a step of one row", engine.step, steps)
        self.end(engine)


def check(generations: Sequence[Generation]) -> None:
    """Raise the error of a generation that has failed."""
    for generation in generations:
        if generation.error is not None:
            raise generation.error
