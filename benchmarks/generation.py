"""What the engine gains, on random weights: ragged batches, second turns, long prompts, overhead.

    python -m benchmarks.generation ragged --shape 135m
    python -m benchmarks.generation turns --shape 135m
    python -m benchmarks.generation prefill --shape 1b
    python -m benchmarks.generation overhead --shape 135m

Each prints one JSON line. What is compared runs alternately, and the median of the runs counts.
`ragged` needs PyPI's `llama-models`.
"""

from __future__ import annotations

import json
import random
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.flags import check_counts, check_model
from benchmarks.load import anonymous_bytes
from benchmarks.random_checkpoint import SHAPES, RandomSource
from llama.checkpoints import load
from llama.commands.script import run_script
from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.engine.sampling import Sampling
from llama.model import Transformer
from llama.predictions import make_requests, run

GREEDY = Sampling(0.0)


def build(shape: str, rows: int, length: int, dtype: str, device: str | None = None) -> Transformer:
    check_model(shape, dtype)
    source = RandomSource(SHAPES[shape])
    args = source.args(max_seq_len=length, max_batch_size=rows)
    picked = load.pick_device(device)
    model = load.load(source, args, picked, getattr(torch, dtype))
    model.setup_cache(rows, length)
    return model


def random_prompts(vocab_size: int, lengths: list[int]) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(100, vocab_size) for _ in range(n)] for n in lengths]


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def meta_model(ours: Transformer, params: dict[str, Any], rows: int, length: int) -> Any:
    """Meta's published Transformer with the same weights, on the CPU, in a group of one."""
    import tempfile

    import fairscale.nn.model_parallel.initialize as fs_init
    import torch.distributed as dist
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer as MetaTransformer

    store = tempfile.NamedTemporaryFile()  # noqa: SIM115
    dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
    fs_init.initialize_model_parallel(1)
    params = {"norm_eps": 1e-5} | params
    torch.set_default_dtype(ours.norm.weight.dtype)
    meta = MetaTransformer(ModelArgs(**params, max_batch_size=rows, max_seq_len=length))
    torch.set_default_dtype(torch.float32)
    meta.load_state_dict(ours.state_dict(), strict=True)
    return meta.eval()


@torch.inference_mode()
def reference_loop(model: Any, prompts: list[list[int]], n: int) -> list[list[int]]:
    """The published way: prefill to the shortest prompt, then all rows one position at a time."""
    total = max(map(len, prompts)) + n
    tokens = torch.full((len(prompts), total), -1)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    given, before = tokens >= 0, 0
    for position in range(min(map(len, prompts)), total):
        logits: Tensor = model.forward(tokens[:, before:position], before)
        drawn = logits[:, -1].argmax(-1)
        tokens[:, position] = torch.where(given[:, position], tokens[:, position], drawn)
        before = position
    return [row[len(p) : len(p) + n].tolist() for row, p in zip(tokens, prompts, strict=True)]


def ragged(shape: str = "135m", dtype: str = "bfloat16", new: int = 64, runs: int = 3) -> None:
    """8 prompts of 16 to 512 tokens, against the reference's loop over Meta's model, greedy."""
    check_counts(new=new, runs=runs)
    lengths = [16, 87, 158, 229, 299, 370, 441, 512]
    model = build(shape, 8, 576, dtype)
    meta = meta_model(model, SHAPES[shape], 8, 576)
    prompts, engine = random_prompts(model.vocab_size, lengths), Engine(model)
    got: dict[str, list[list[int]]] = {}

    def ours() -> None:
        requests = make_requests(prompts, None, max_gen_len=new, sampling=GREEDY, reuse=False)
        run(engine, requests)
        got["ours"] = [request.ids for request in requests]

    def theirs() -> None:
        got["reference"] = reference_loop(meta, prompts, new)

    times = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    same = [a[0] == b[0] for a, b in zip(got["ours"], got["reference"], strict=True)]
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    report("ragged", shape, dtype, seconds=a, reference=b, ratio=b / a, same_first_id=sum(same))


def turns(shape: str = "135m", dtype: str = "bfloat16", history: int = 1000, runs: int = 5) -> None:
    """Time to first token of a turn of 20 tokens after `history`, cached and cold."""
    check_counts(history=history, runs=runs)
    model = build(shape, 1, history + 100, dtype)
    [dialog] = random_prompts(model.vocab_size, [history + 20])
    engine = Engine(model)
    run(engine, [Request(dialog[:history], 1, GREEDY)])

    def turn(reuse: bool) -> float:
        if not reuse:
            engine.forget()
        request = Request(dialog, 1, GREEDY, reuse=reuse)
        taken = seconds(lambda: run(engine, [request]))
        assert request.reused == (history if reuse else 0)
        run(engine, [Request(dialog[:history], 1, GREEDY)])
        return taken

    times = [(turn(True), turn(False)) for _ in range(runs)]
    warm, cold = (statistics.median(column) for column in zip(*times, strict=True))
    report("turns", shape, dtype, cached=warm, cold=cold, ratio=warm / cold)


@contextmanager
def peak_anonymous(result: dict[str, float]) -> Any:
    """The most memory that no file backs, above what there was, sampled every 5 ms."""
    start, done = anonymous_bytes(), threading.Event()
    peak = start

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        result["peak_GiB"] = (peak - start) / 2**30


def prefill(shape: str = "1b", dtype: str = "bfloat16", length: int = 8192) -> None:
    """Memory above weights and cache of one long prompt, and its speed."""
    check_counts(length=length)
    model = build(shape, 1, length, dtype)
    for cache in model.caches():  # so that its pages are there before
        cache.k.fill_(0)
        cache.v.fill_(0)
    [prompt] = random_prompts(model.vocab_size, [length - 1])
    request, result = Request(prompt, 1, GREEDY), dict[str, float]()
    with peak_anonymous(result):
        taken = seconds(lambda: run(Engine(model), [request]))
    report("prefill", shape, dtype, **result, tok_per_s=len(prompt) / taken)


def overhead(shape: str = "135m", dtype: str = "bfloat16", rows: int = 8, steps: int = 60) -> None:
    """Milliseconds a row and step outside the model: greedy, and sampled with a seed.

    Random weights predict nothing; the low temperature makes distributions as sharp as a model's.
    """
    check_counts(rows=rows, steps=steps)
    model = build(shape, rows, 256, dtype)
    prompts = random_prompts(model.vocab_size, [16] * rows)
    inside = 0.0

    def timed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal inside
            start = time.perf_counter()
            out = function(*args, **kwargs)
            inside += time.perf_counter() - start
            return out

        return call

    model.hidden = timed(model.hidden)  # type: ignore[method-assign]
    model.logits = timed(model.logits)  # type: ignore[method-assign]
    result = {}
    for name, how in (("greedy", GREEDY), ("sampled", Sampling(0.2, 0.9))):
        engine = Engine(model)
        for request in make_requests(prompts, 1, max_gen_len=steps + 1, sampling=how):
            engine.add(request)
        engine.step()
        outside = []
        for _ in range(steps):
            inside = 0.0
            outside.append(seconds(engine.step) - inside)
        result[f"{name}_ms_per_row"] = statistics.median(outside) * 1000 / rows
    report("overhead", shape, dtype, **result)


def steps(
    shape: str = "1b",
    dtype: str = "bfloat16",
    quantize: str | None = None,
    context: int = 4096,
    rows: int = 8,
    runs: int = 5,
) -> None:
    """A decoding step after 128 tokens, after `context`, and of several rows after 128, in turn."""
    check_model(shape, dtype, quantize)
    check_counts(context=context, rows=rows, runs=runs)
    model = build(shape, rows, context + 128, dtype)
    load.tune(model, quantize, exact=False)
    for cache in model.caches():  # any finite numbers take as long as real ones
        cache.k.normal_()
        cache.v.normal_()
    tokens = torch.full((rows, 1), 100)

    @torch.inference_mode()
    def step(B: int, position: int) -> float:
        many = [
            seconds(lambda: model.logits(model.hidden(tokens[:B], position))) for _ in range(10)
        ]
        return statistics.median(many)

    step(rows, context)
    times = [(step(1, 128), step(1, context), step(rows, 128)) for _ in range(runs)]
    short, long, several = (statistics.median(column) for column in zip(*times, strict=True))
    report(
        f"steps {quantize or ''}",
        shape,
        dtype,
        ms_after_128=short * 1e3,
        longer_context_takes_times=long / short,
        rows_give_times_the_throughput=rows * short / several,
    )


def report(what: str, shape: str, dtype: str, **figures: float) -> None:
    rounded = {name: float(f"{value:.4g}") for name, value in figures.items()}
    print(json.dumps({"what": what, "shape": shape, "dtype": dtype, **rounded}))


if __name__ == "__main__":
    commands = (ragged, turns, prefill, overhead, steps)
    verbs = {command.__name__: command for command in commands}
    run_script(verbs, "benchmarks.generation")
