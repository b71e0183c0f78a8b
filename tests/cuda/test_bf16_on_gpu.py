"""bf16 on a GPU, plain and quantized: the ids that it draws have the CPU's log-probabilities.

Rounding may choose another id at a near tie, so ids are not compared. Instead the CPU scores what
the GPU has generated, at every step.
"""

from __future__ import annotations

import functools

import pytest
import torch

from llama import Engine, Generation
from llama.layers.optimize import optimize, quantize_model
from tests.cuda.cases import greedy, make_engine, make_model, prompt

pytestmark = pytest.mark.cuda

WAYS = {
    "eager": (None, False),
    "compiled": (None, True),
    "int8": ("int8", False),
    "int8 compiled": ("int8", True),
    "int4": ("int4", False),
    "int4 compiled": ("int4", True),
}
Way = tuple[Engine, "str | None"]


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> Way:
    """An engine on the GPU, and its quantization."""
    quantize, compile = WAYS[request.param]
    return make_engine(dtype=torch.bfloat16, compile=compile, quantize=quantize), quantize


@functools.cache
def oracle(quantize: str | None) -> Engine:
    """In fp32 on the CPU, with the weights that bf16 or the quantization of bf16 leaves."""
    model = make_model("heads of 64", torch.device("cpu"), torch.bfloat16)
    quantize_model(model, quantize)
    optimize(model, exact=True)
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False)]:
            module.register_parameter(name, torch.nn.Parameter(tensor.detach().float()))
    return Engine(model)


def assert_scores(generations: list[Generation], quantize: str | None) -> None:
    """Of generated ids and of scored prompts, within the rounding of bf16."""
    for generation in generations:
        assert generation.error is None
        n = len(generation.request.prompt)
        [scored] = oracle(quantize).run([greedy(generation.tokens, 0, score_from=1)])
        assert scored.error is None
        found = [*generation.prompt_logprobs[1:], *generation.generated_logprobs]
        start = 1 if generation.prompt_logprobs else n
        wanted = scored.prompt_logprobs[start:]
        difference = (torch.tensor(found) - torch.tensor(wanted)).abs()
        assert len(found) > 0 and difference.mean() < 0.03 and difference.max() < 0.15


def test_ragged_and_growing(way: Way) -> None:
    engine, quantize = way
    lengths = (3, 240, 40, 250, 1, 600)
    assert_scores(engine.run([greedy(prompt(n), 30) for n in lengths]), quantize)


def test_scored_prompts(way: Way) -> None:
    engine, quantize = way
    assert_scores(engine.run([greedy(prompt(n), 4, score_from=1) for n in (200, 33)]), quantize)


def test_requests_come_and_go(way: Way) -> None:
    engine, quantize = way
    begun = [engine.add(greedy(prompt(n), 25)) for n in (130, 9)]
    for _ in range(4):
        engine.step()
    late = [engine.add(greedy([*prompt(130), *prompt(3)], 12)), engine.add(greedy(prompt(300), 9))]
    for _ in range(3):
        engine.step()
    engine.cancel(begun[1].id)
    generations = [*begun, *late]
    engine.wait(lambda: all(generation.finish_reason for generation in generations))
    assert late[0].reused == 130
    assert_scores(generations, quantize)
