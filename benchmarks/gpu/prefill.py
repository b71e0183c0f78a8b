"""Prefill of the 8B shape: time until the first id of one prompt."""

from __future__ import annotations

import time

from benchmarks.gpu.ceilings import matmul_ceiling
from benchmarks.gpu.decode import QUANTIZE, check
from benchmarks.gpu.models import layer_parameters, prompt, random_model
from benchmarks.gpu.profiling import profile
from benchmarks.gpu.record import Run
from benchmarks.gpu.timing import wait
from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.engine.sampling import Sampling
from llama.layers.optimize import optimize, quantize_model

RUNS = 3


def run(run: Run, scheme: str) -> None:
    """Measure each length, computed at once and in chunks."""
    sizes, device = run.sizes, run.device
    longest = max(sizes.prompts)
    model = random_model(sizes.shape, 1, longest + 8, device)
    parameters, args = layer_parameters(model), model.params
    quantize_model(model, QUANTIZE[scheme])
    optimize(model)
    wait(device)
    ceiling = matmul_ceiling(run, scheme)

    def measure(row: str, length: int, chunk: int) -> None:
        engine, times = Engine(model, chunk), []
        for i in range(RUNS + 1):
            generation = engine.add(
                Request(prompt(args.vocab_size, length, i), 1, Sampling(0.0), reuse=False)
            )
            wait(device)
            start = time.perf_counter()
            while generation.finish_reason is None:
                engine.step()
            times.append(time.perf_counter() - start)
            check([generation])
        # The layers, and causal attention: two matmuls of half of length x length in each head.
        flops = 2.0 * parameters * length + 2.0 * args.n_layers * args.dim * length**2
        rates = [flops / t / 1e12 for t in times[1:]]
        run.figure(row, "prefill", "tok/s", [length / t for t in times[1:]], "higher")
        run.figure(row, "arithmetic", "TFLOP/s", rates, "higher")
        run.figure(row, "of matmul", "", [rate / ceiling for rate in rates], "higher")

    for length in reversed(sizes.prompts):
        for chunk in [length, *(n for n in sizes.chunks if n < length)]:
            row = f"{scheme}, {length} tokens" + f" by {chunk}" * (chunk < length)
            run.attempt(row, measure, row, length, chunk)
    engine = Engine(model, longest)

    def once() -> None:
        engine.run([Request(prompt(args.vocab_size, longest), 1, Sampling(0.0), reuse=False)])

    run.attempt("profile", profile, run, f"{scheme}, a prompt of {longest}", once, 1)
