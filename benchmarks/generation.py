"""What the engine gains, on random weights: ragged batches, second turns, long prompts, overhead.

    python -m benchmarks.generation ragged --shape 135m
    python -m benchmarks.generation turns --shape 135m
    python -m benchmarks.generation prefill --shape 1b
    python -m benchmarks.generation overhead --shape 135m
    python -m benchmarks.generation steps --shape 1b --quantize int4 --out steps.json

Each prints a table and one JSON line, which --out saves. What is compared runs alternately.
`ragged` needs PyPI's `llama-models`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.flags import check_counts, check_file, check_model
from benchmarks.memory import peak_anonymous
from benchmarks.meta_peer import meta_model, reference_loop
from benchmarks.ours import GREEDY, build, fill_cache, greedy, make_requests, random_prompts
from benchmarks.random_checkpoint import SHAPES, RandomSource
from benchmarks.report import Figure, finish, make_result
from benchmarks.script import run_benchmark
from llama.engine.engine import Engine
from llama.engine.sampling import Sampling

RAGGED_LENGTHS = [16, 87, 158, 229, 299, 370, 441, 512]


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def random_engine(shape: str, rows: int, length: int, dtype: str, **options: Any) -> Engine:
    """`build` on random weights of a shape."""
    return build(RandomSource(SHAPES[shape]), rows, length, dtype, **options)


def ragged(
    shape: str = "135m",
    dtype: str = "bfloat16",
    new: int = 64,
    runs: int = 3,
    out: str | None = None,
) -> None:
    """8 prompts of 16 to 512 tokens, greedy, beside the published loop over Meta's model."""
    check(shape, dtype, out, new=new, runs=runs)
    engine = random_engine(shape, 8, 576, dtype, exact=True)
    model = engine.model
    meta = meta_model(model, SHAPES[shape], 8, 576)
    prompts = random_prompts(model.vocab_size, RAGGED_LENGTHS)
    ids: dict[str, list[list[int]]] = {}

    def ours() -> None:
        ids["ours"], _ = greedy(engine, prompts, new)

    def theirs() -> None:
        ids["theirs"] = reference_loop(meta, prompts, new)

    times = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    own, reference = (list(column) for column in zip(*times, strict=True))
    same = [a[0] == b[0] for a, b in zip(ids["ours"], ids["theirs"], strict=True)]
    figures = [
        Figure("llama3", "whole batch", "s", own, better="lower"),
        Figure("reference", "whole batch", "s", reference, better="lower"),
        Figure("reference / llama3", "whole batch", "", ratios(reference, own), better="higher"),
        Figure("rows with the same first id", "whole batch", "", [sum(same)], better="higher"),
    ]
    report("ragged", {"shape": shape, "dtype": dtype, "new": new, "runs": runs}, figures, out)


def turns(
    shape: str = "135m",
    dtype: str = "bfloat16",
    history: int = 1000,
    runs: int = 5,
    out: str | None = None,
) -> None:
    """Time to the first token of a turn of 20 tokens after `history`, cached and not."""
    check(shape, dtype, out, history=history, runs=runs)
    engine = random_engine(shape, 1, history + 100, dtype, exact=True)
    [dialog] = random_prompts(engine.model.vocab_size, [history + 20])
    greedy(engine, [dialog[:history]], 1, reuse=True)

    def turn(reuse: bool) -> float:
        if not reuse:
            engine.forget()
        start = time.perf_counter()
        _, [reused] = greedy(engine, [dialog], 1, reuse)
        taken = time.perf_counter() - start
        assert reused == (history if reuse else 0)
        greedy(engine, [dialog[:history]], 1, reuse=True)
        return taken

    times = [(turn(True), turn(False)) for _ in range(runs)]
    cached, cold = (list(column) for column in zip(*times, strict=True))
    figures = [
        Figure("dialog cached", "first token", "s", cached, better="lower"),
        Figure("not cached", "first token", "s", cold, better="lower"),
        Figure("cached / not cached", "first token", "", ratios(cached, cold), better="lower"),
    ]
    settings = {"shape": shape, "dtype": dtype, "history": history, "runs": runs}
    report("turns", settings, figures, out)


def prefill(
    shape: str = "1b", dtype: str = "bfloat16", length: int = 8192, out: str | None = None
) -> None:
    """Memory above weights and cache of one prompt of `length` - 1 tokens, and its speed."""
    check(shape, dtype, out, length=length)
    engine = random_engine(shape, 1, length, dtype, exact=True)
    fill_cache(engine)  # so that its pages are resident before
    prompts, peak = random_prompts(engine.model.vocab_size, [length - 1]), dict[str, float]()
    with peak_anonymous(peak):
        taken = seconds(lambda: greedy(engine, prompts, 1))
    row = f"prompt of {length - 1} tokens"
    figures = [
        Figure(row, "memory above weights and cache", "GiB", [peak["peak_GiB"]], better="lower"),
        Figure(row, "prefill", "tok/s", [(length - 1) / taken], better="higher"),
    ]
    report("prefill", {"shape": shape, "dtype": dtype, "length": length}, figures, out)


def overhead(
    shape: str = "135m",
    dtype: str = "bfloat16",
    rows: int = 8,
    steps: int = 60,
    out: str | None = None,
) -> None:
    """Time of a decode step outside the model, for each row: greedy, and sampled with a seed.

    Random weights predict nothing; the low temperature makes distributions as sharp as a trained
    model's.
    """
    check(shape, dtype, out, rows=rows, steps=steps)
    engine = random_engine(shape, rows, 256, dtype, exact=True)
    model = engine.model
    prompts = random_prompts(model.vocab_size, [16] * rows)
    inside = 0.0  # seconds in the model, in this step

    def timed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal inside
            start = time.perf_counter()
            result = function(*args, **kwargs)
            inside += time.perf_counter() - start
            return result

        return call

    model.hidden = timed(model.hidden)  # type: ignore[method-assign]
    model.logits = timed(model.logits)  # type: ignore[method-assign]
    figures = []
    for name, sampling in (("greedy", GREEDY), ("sampled with a seed", Sampling(0.2, 0.9))):
        engine.forget()
        for request in make_requests(prompts, steps + 1, sampling, seed=1):
            engine.add(request)
        engine.step()
        outside = []
        for _ in range(steps):
            inside = 0.0
            outside.append((seconds(engine.step) - inside) * 1000 / rows)
        figures.append(Figure(name, "outside the model, per row", "ms", outside, better="lower"))
    settings = {"shape": shape, "dtype": dtype, "rows": rows, "steps": steps}
    report("overhead", settings, figures, out)


def steps(
    shape: str = "1b",
    dtype: str = "bfloat16",
    quantize: str | None = None,
    context: int = 4096,
    rows: int = 8,
    runs: int = 5,
    out: str | None = None,
) -> None:
    """A decode step after 128 tokens, after `context`, and of several rows after 128, in turn."""
    check_model(shape, dtype, quantize)
    check(shape, dtype, out, context=context, rows=rows, runs=runs)
    engine = random_engine(shape, rows, context + 128, dtype, quantize=quantize)
    model, cache = engine.model, engine.cache
    fill_cache(engine)
    tokens = torch.full((rows, 1), 100)

    @torch.inference_mode()
    def step(B: int, position: int) -> float:
        times = [
            seconds(lambda: model.logits(model.hidden(tokens[:B], position, cache)))
            for _ in range(10)
        ]
        return statistics.median(times)

    step(rows, context)
    times = [(step(1, 128), step(1, context), step(rows, 128)) for _ in range(runs)]
    short, long, several = (list(column) for column in zip(*times, strict=True))
    throughput = [rows * ratio for ratio in ratios(short, several)]
    row, longer = quantize or dtype, f"step after {context} tokens / after 128"
    figures = [
        Figure(row, "step after 128 tokens", "ms", [t * 1e3 for t in short], better="lower"),
        Figure(row, longer, "", ratios(long, short), better="lower"),
        Figure(row, f"throughput of {rows} rows / of 1 row", "", throughput, better="higher"),
    ]
    settings = {"shape": shape, "dtype": dtype, "quantize": quantize, "context": context}
    report("steps", settings | {"rows": rows, "runs": runs}, figures, out)


def check(shape: str, dtype: str, out: str | None, **counts: int) -> None:
    """Check the flags that all commands have in common."""
    check_model(shape, dtype)
    check_counts(**counts)
    check_file("out", out, ".json")


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Of each run."""
    return [a / b for a, b in zip(above, below, strict=True)]


def report(what: str, settings: dict[str, Any], figures: list[Figure], out: str | None) -> None:
    """Print and save the result of a command."""
    model = " ".join(str(settings[key]) for key in ("shape", "quantize") if settings.get(key))
    finish(make_result(f"generation {what}, {model}", settings, figures), out)


if __name__ == "__main__":
    commands = (ragged, turns, prefill, overhead, steps)
    run_benchmark({command.__name__: command for command in commands}, "generation")
