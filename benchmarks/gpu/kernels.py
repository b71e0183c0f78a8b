"""Single layers of the 8B shape, each replayed as a CUDA graph: linears and decoding attention.

A linear is timed over all layers of a model, so that its weights are not in the GPU's cache.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.ceilings import copy_ceiling
from benchmarks.gpu.decode import QUANTIZE
from benchmarks.gpu.models import random_model
from benchmarks.gpu.record import Run
from benchmarks.gpu.timing import graphed, seconds_of
from llama.layers.optimize import optimize, quantize_model
from llama.model import Transformer

# Those that a model has: replaced modules may have joined some.
LINEARS = ("output", "attention.wqkv", "attention.wq", "attention.wk", "attention.wo",
           "feed_forward.w13", "feed_forward.w1", "feed_forward.w2")  # fmt: skip


def run(run: Run) -> None:
    """Measure the linears of each format, then attention."""
    sizes = run.sizes
    ceiling = copy_ceiling(run, "device")
    shape = sizes.shape | {"n_layers": sizes.copies}
    for scheme, quantize in QUANTIZE.items():
        model = random_model(shape, max(sizes.rows), max(sizes.contexts), run.device)
        quantize_model(model, quantize)
        optimize(model)
        run.attempt(scheme, linears, run, scheme, model, ceiling)
        if quantize is None:
            run.attempt("attention", attention, run, model, ceiling)
        del model
        gc.collect()


@torch.inference_mode()
def linears(run: Run, scheme: str, model: Transformer, ceiling: float) -> None:
    """Each linear of a layer, and the output layer, for several rows of x."""

    def measure(name: str) -> None:
        owners = [model] if name == "output" else list(model.layers)
        modules = [owner.get_submodule(name) for owner in owners]
        K = model.params.hidden_dim if name.endswith("w2") else model.params.dim
        size = sum(t.nbytes for t in modules[0].state_dict().values())
        for rows in run.sizes.rows:
            x = torch.randn(rows, 1, K, device=run.device, dtype=torch.bfloat16)
            row = f"{scheme} {name}, {rows} rows"
            run.attempt(row, one_linear, run, row, modules, x, (size, ceiling))

    known = {name for name, _ in [*model.layers[0].named_modules(), *model.named_modules()]}
    for name in (name for name in LINEARS if name in known):
        run.attempt(f"{scheme} {name}", measure, name)


@torch.inference_mode()
def one_linear(
    run: Run, row: str, modules: list[nn.Module], x: Tensor, sizes: tuple[int, float]
) -> None:
    calls = max(1, 32 // len(modules))

    def work() -> None:
        for module in modules:
            module(x)

    report(run, row, work, (calls, len(modules)), sizes)


@torch.inference_mode()
def attention(run: Run, model: Transformer, ceiling: float) -> None:
    """The core of each layer, for one new id a row at the end of a context."""
    for context in run.sizes.contexts:
        for rows in run.sizes.rows:
            row = f"attention, {rows} rows, context {context}"
            run.attempt(row, one_attention, run, row, model, (rows, context), ceiling)


@torch.inference_mode()
def one_attention(
    run: Run, row: str, model: Transformer, shape: tuple[int, int], ceiling: float
) -> None:
    """At (rows, context). Each layer has a cache of its own, as in a model."""
    (rows, context), args, device = shape, model.params, run.device
    caches = model.new_cache(rows, context)
    starts = torch.full((rows,), context - 1, device=device)
    _, mask, at = model.locate((rows, 1), starts, caches, context)
    for cache in caches:
        cache.k.normal_()
        cache.v.normal_()
    xq = torch.randn(rows, 1, args.n_heads, args.head_dim, device=device).bfloat16()
    cores = [layer.get_submodule("attention.core") for layer in model.layers]

    def work() -> None:
        for core, cache in zip(cores, caches, strict=True):
            core(xq, cache.k, cache.v, mask, at)

    def sdpa() -> None:
        for cache in caches:
            keys, values = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
            F.scaled_dot_product_attention(xq.transpose(1, 2), keys, values, enable_gqa=True)

    size = caches[0].k.nbytes + caches[0].v.nbytes
    report(run, row, work, (2, len(cores)), (size, ceiling))
    report(
        run, f"torch's SDPA, {rows} rows, context {context}", sdpa, (2, len(cores)), (size, ceiling)
    )


def report(
    run: Run,
    row: str,
    work: Callable[[], None],
    counts: tuple[int, int],
    sizes: tuple[int, float],
) -> None:
    """Microseconds of one of `work`'s calls, and its bandwidth relative to copying.

    Args:
        counts: of `work` in a run, and of the calls in it.
        sizes: bytes that a call reads, and GB/s of copying.
    """
    (calls, inside), (size, ceiling) = counts, sizes
    times = [t / inside for t in seconds_of(graphed(work, run.device), run.device, 5, calls)]
    run.figure(row, "time", "us", [t * 1e6 for t in times], "lower")
    run.figure(row, "of copy", "", [size / t / 1e9 / ceiling for t in times], "higher")
