"""transformers with the same shape: SDPA, a static cache, eager and compiled."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.models import fill
from benchmarks.gpu.record import Run
from benchmarks.gpu.timing import host_seconds, wait
from benchmarks.transformers_peer import config_of
from llama.model import ModelArgs

GPT_FAST = (
    "gpt-fast publishes, for Llama 2 7B in bf16 on an A100, a compiled decoding step at 69 % of "
    "the bandwidth (pytorch.org/blog/accelerating-generative-ai-2); it is not measured here"
)
GROUPS = 5


def run(run: Run) -> None:
    """Decoding of one row after the shortest context."""
    run.note(GPT_FAST)
    model = random_transformers_model(run)
    run.attempt("eager", measure, run, model, "eager", model.forward)
    compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    run.attempt("compiled", measure, run, model, "compiled", compiled, least=20)


def random_transformers_model(run: Run) -> Any:
    """LlamaForCausalLM in bf16 with random weights made on the device."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = config_of(ModelArgs(**run.sizes.shape))
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    fill(model, run.device)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(run.device)
    return model.eval()


@torch.no_grad()
def measure(run: Run, model: Any, how: str, forward: Callable[..., Any]) -> None:
    """Steps of one id, each from the one before, without a wait between them."""
    from transformers import StaticCache

    sizes, device = run.sizes, run.device
    context = sizes.contexts[0]
    room = context + 2 * sizes.steps + 20
    cache = StaticCache(config=model.config, max_cache_len=room)
    parameters = inspect.signature(type(model).forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"  # another name since 5.20

    def step(call: Callable[..., Any], ids: Tensor, position: int) -> Tensor:
        positions = torch.arange(position, position + ids.shape[1], device=device)
        options = {name: cache, "position_ids": positions.unsqueeze(0), "use_cache": True}
        if "cache_position" in parameters:
            options["cache_position"] = positions
        torch.compiler.cudagraph_mark_step_begin()
        out = call(input_ids=ids, logits_to_keep=1, **options)
        chosen: Tensor = out.logits[:, -1:].argmax(-1)
        return chosen.clone()

    ids = torch.randint(0, model.config.vocab_size, (1, context), device=device)
    ids, position = step(model.forward, ids, 0), context

    def next_step() -> None:
        nonlocal ids, position
        ids, position = step(forward, ids, position), position + 1

    start = time.perf_counter()
    for _ in range(6):
        next_step()
    wait(device)
    run.figure(how, "first steps", "s", [time.perf_counter() - start], "lower")
    times = host_seconds(next_step, device, GROUPS, max(1, sizes.steps // GROUPS))
    row = f"transformers, bf16 {how}, batch 1, context {context}"
    run.figure(row, "step", "tok/s", [1 / t for t in times], "higher")
