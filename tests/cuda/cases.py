"""Small models on the GPU and the same on the CPU. In a rehearsal both are on the CPU."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Sequence
from typing import Any

import torch

from llama import Engine, Generation, ModelArgs, Request, Sampling, Transformer
from llama.layers.optimize import optimize, quantize_model
from tests.models import random_weights

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REHEARSING = DEVICE.type == "cpu" and bool(os.environ.get("LLAMA3_REHEARSE_CUDA"))
if REHEARSING:  # the code of the compiled step, without waiting for a compiler
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

ROWS, ROOM = 4, 640
BASE: dict[str, Any] = {"n_layers": 2, "n_heads": 4, "vocab_size": 512, "multiple_of": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "heads of 64": BASE | {"dim": 256, "n_kv_heads": 2},
    "heads of 128": BASE | {"dim": 512, "n_kv_heads": 1},
}
GREEDY = Sampling(0.0)


def make_model(
    shape: str,
    device: torch.device = DEVICE,
    dtype: torch.dtype = torch.float32,
    rows: int = ROWS,
    room: int = ROOM,
) -> Transformer:
    """A plain model; the weights depend on the shape only."""
    args = SHAPES[shape]
    model = Transformer(ModelArgs(**args, max_batch_size=rows, max_seq_len=room))
    model.load_state_dict(weights(shape))
    return model.to(device, dtype).eval()


@functools.cache
def weights(shape: str) -> dict[str, torch.Tensor]:
    return random_weights(**SHAPES[shape])


def make_engine(
    shape: str = "heads of 64",
    dtype: torch.dtype = torch.float32,
    *,
    compile: bool = False,
    quantize: str | None = None,
    prefill_chunk: int = 512,
    **sizes: int,
) -> Engine:
    """An engine on the GPU."""
    model = make_model(shape, DEVICE, dtype, **sizes)
    quantize_model(model, quantize)
    optimize(model)
    engine = Engine(model, prefill_chunk)
    if compile:
        assert engine.compile()
    return engine


def prompt(length: int, seed: int = 0) -> list[int]:
    """Seeded ids."""
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(512) for _ in range(length)]


def greedy(ids: Sequence[int], new: int, **options: Any) -> Request:
    return Request(ids, new, GREEDY, logprobs=True, **options)


@functools.cache
def on_cpu(request: Request, shape: str = "heads of 64") -> Generation:
    """What the plain model generates in fp32 on the CPU, alone."""
    engine = Engine(make_model(shape, torch.device("cpu"), rows=1))
    [generation] = engine.run([request])
    assert generation.error is None
    return generation


def assert_as_on_cpu(generations: Sequence[Generation], shape: str = "heads of 64") -> None:
    """Compare ids, and log-probabilities within 1e-4. One that was cancelled has the first ids."""
    for generation in generations:
        assert generation.error is None
        wanted, n = on_cpu(generation.request, shape), len(generation.ids)
        if generation.finish_reason != "cancelled":
            assert n == len(wanted.ids)
        assert generation.ids == wanted.ids[:n]
        assert_close(generation.generated_logprobs, wanted.generated_logprobs[:n])
        assert_close(generation.prompt_logprobs[1:], wanted.prompt_logprobs[1:])


def assert_close(
    found: Sequence[float | None], wanted: Sequence[float | None], atol: float = 1e-4
) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=0, atol=atol)
