"""This library below its public API: a model on a source of weights, and greedy generation.

The only file of the benchmarks that knows the engine and the KV cache, with the two measurements of
`benchmarks.generation` that look inside a step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llama.checkpoints.load import load_model
from llama.checkpoints.source import Source
from llama.distributed.device import pick_device
from llama.engine.engine import Engine
from llama.engine.request import Generation, Request
from llama.engine.sampling import Sampling
from llama.layers.optimize import optimize, quantize_model

GREEDY = Sampling(0.0)


def build(
    source: Source,
    rows: int,
    length: int,
    dtype: str,
    *,
    quantize: str | None = None,
    exact: bool = False,
    compile: bool = False,
    device: str | None = None,
) -> Engine:
    """An engine with an empty KV cache of `rows` x `length` positions.

    Args:
        exact: keep the arithmetic of Meta's code.

    Raises:
        RuntimeError: `compile`, and the decode step cannot be compiled here.
    """
    args = source.args(max_seq_len=length, max_batch_size=rows)
    model = load_model(source, args, pick_device(device), getattr(torch, dtype))
    quantize_model(model, quantize)
    optimize(model, exact)
    if quantize is not None:  # copy, to release the mapped file that parameters are views of
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    engine = Engine(model)
    if compile and not engine.compile():
        raise RuntimeError("the step cannot be compiled here; leave out --compile")
    return engine


def fill_cache(engine: Engine) -> None:
    """Put random numbers into the whole KV cache; reading them takes as long as real ones."""
    for cache in engine.cache:
        cache.k.normal_()
        cache.v.normal_()


def random_prompts(vocab_size: int, lengths: Sequence[int]) -> list[list[int]]:
    """Seeded ids, one prompt of each length."""
    rng = random.Random(0)
    return [[rng.randrange(100, vocab_size) for _ in range(n)] for n in lengths]


def make_requests(
    prompts: Sequence[Sequence[int]],
    new: int,
    sampling: Sampling = GREEDY,
    seed: int | None = None,
    **options: Any,
) -> list[Request]:
    """Requests of `new` ids each, one for each prompt.

    Args:
        options: of every `Request`.
    """
    return [Request(prompt, new, sampling, seed, **options) for prompt in prompts]


def greedy(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    new: int,
    reuse: bool = False,
    after_step: Callable[[Sequence[Generation]], object] | None = None,
) -> tuple[list[list[int]], list[int]]:
    """Run a batch of greedy requests.

    Args:
        reuse: start from the cached prefix of each prompt.
        after_step: called between steps.

    Returns:
        (ids of each request, how many ids of each prompt were cached already).
    """
    generations = engine.run(make_requests(prompts, new, reuse=reuse), after_step)
    for generation in generations:
        if generation.error is not None:
            raise generation.error
    return [g.ids for g in generations], [g.reused for g in generations]
