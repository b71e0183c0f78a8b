"""Prefill and decode beside other systems, with the same random weights, alternately in one run.

    python -m benchmarks.decode --shape 1b --prompt 128 --new 32 --peers reference,transformers
    python -m benchmarks.decode --shape 1b --quantize int8
    python -m benchmarks.decode --shape 135m --batch 8 --prompt 512

Prints a table, then one JSON line. Peers that share weights must give the same first tokens, or
the run says so. Peers: `reference` (pip install llama-models), `transformers`, `exact` (this
library with build(..., exact=True)), `bf16` (this library, not quantized).
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import fire
import torch
from torch import Tensor

from benchmarks.generation import build, meta_model, random_prompts
from benchmarks.random_checkpoint import SHAPES
from llama.checkpoint import tune
from llama.engine import Engine
from llama.model import Transformer
from llama.predictions import make_requests, run
from llama.sampling import Sampling

# Feeds prompts, then decodes greedily: (prompts, new tokens) -> (ids a row, seconds to the first)
Runner = Callable[[list[list[int]], int], tuple[list[list[int]], float]]


@dataclass
class System:
    """One that runs, and what was measured of it."""

    name: str
    runner: Runner
    weight_bytes: int  # that a decode step reads
    first: list[float] = field(default_factory=list)  # seconds to the first token
    step: list[float] = field(default_factory=list)  # seconds a decode step
    ids: list[list[int]] = field(default_factory=list)

    def measure(self, prompts: list[list[int]], new: int) -> None:
        start = time.perf_counter()
        self.ids, first = self.runner(prompts, new)
        self.first.append(first)
        self.step.append((time.perf_counter() - start - first) / (new - 1))


def read_bandwidth() -> float:
    """Bytes a second: the fastest of a few sums over 1 GiB."""
    data = torch.ones(1 << 28)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return data.nbytes / min(times)


def ours(model: Transformer) -> Runner:
    engine = Engine(model)

    def generate(prompts: list[list[int]], new: int) -> tuple[list[list[int]], float]:
        start, first = time.perf_counter(), 0.0

        def watch() -> None:
            nonlocal first
            first = first or time.perf_counter() - start

        requests = make_requests(
            prompts, None, max_gen_len=new, sampling=Sampling(0.0), reuse=False, watch=watch
        )
        run(engine, requests)
        return [request.ids for request in requests], first

    return generate


def stepwise(forward: Callable[[Tensor, int], Tensor]) -> Runner:
    """Of a model that is given (B, T) ids and their position and returns logits of the last."""

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new: int) -> tuple[list[list[int]], float]:
        start = time.perf_counter()
        tokens, position, drawn = torch.tensor(prompts), 0, []
        for _ in range(new):
            logits = forward(tokens, position)
            position += tokens.shape[1]
            tokens = logits.argmax(-1, keepdim=True)
            drawn.append(tokens)
            if len(drawn) == 1:
                first = time.perf_counter() - start
        return torch.cat(drawn, 1).tolist(), first

    return generate


def reference_runner(model: Transformer, shape: str, rows: int, length: int) -> Runner:
    meta = meta_model(model, shape, rows, length)
    return stepwise(lambda tokens, position: meta.forward(tokens, position)[:, -1])


def transformers_runner(model: Transformer) -> Runner:
    """LlamaForCausalLM with the same weights, key-value cache and last-position logits."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from llama.convert.hf_config import hf_name
    from llama.convert.hf_export import halve

    args = model.params
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.use_scaled_rope:
        rope |= {"rope_type": "llama3", "factor": args.scale_factor, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.max_seq_len,
        rms_norm_eps=args.norm_eps,
        rope_parameters=rope,
    )
    weights = {
        hf_name(name): halve(w, args.head_dim) if name.split(".")[-2] in ("wq", "wk") else w
        for name, w in model.state_dict().items()
    }
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config)
    theirs.load_state_dict(weights, strict=True, assign=True)
    theirs.model.rotary_emb = LlamaRotaryEmbedding(config=config)
    theirs.eval()
    cache = DynamicCache()

    def forward(tokens: Tensor, position: int) -> Tensor:
        nonlocal cache
        cache = DynamicCache() if position == 0 else cache
        out = theirs(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1]
        return logits

    return stepwise(forward)


def bytes_read(model: Transformer) -> int:
    """Of weights, by a decode step: all but the embedding."""
    return sum(w.nbytes for n, w in model.state_dict().items() if not n.startswith("tok_emb"))


def systems(
    shape: str, dtype: str, quantize: str | None, peers: list[str], rows: int, length: int
) -> list[System]:
    def make(scheme: str | None, exact: bool) -> Transformer:
        model = build(shape, rows, length, dtype)
        tune(model, scheme, exact)
        return model

    mine = make(quantize, False)
    found = [System(f"llama3 {quantize or dtype}", ours(mine), bytes_read(mine))]
    for name in peers:
        if name in ("bf16", "exact"):
            model = make(None, name == "exact")
            found.append(System(f"llama3 {name}", ours(model), bytes_read(model)))
        elif name in ("reference", "transformers"):
            model = make(None, True)
            runner = (
                transformers_runner(model)
                if name == "transformers"
                else reference_runner(model, shape, rows, length)
            )
            found.append(System(name, runner, bytes_read(model)))
        else:
            raise ValueError(f"unknown peer {name!r}")
    return found


def main(
    shape: str = "135m",
    dtype: str = "bfloat16",
    quantize: str | None = None,
    batch: int = 1,
    prompt: int = 128,
    new: int = 32,
    runs: int = 5,
    peers: str | tuple[str, ...] = (),
) -> None:
    """Measure and print. `prompt`: tokens of each of `batch` prompts. See the file's head."""
    names = peers.split(",") if isinstance(peers, str) else list(peers)
    every = systems(shape, dtype, quantize, names, batch, prompt + new)
    prompts = random_prompts(SHAPES[shape]["vocab_size"], [prompt] * batch)
    for system in every:
        system.measure(prompts, 3)  # warm
        system.first.clear(), system.step.clear()
    bandwidth = read_bandwidth()
    for _ in range(runs):
        for system in every:
            system.measure(prompts, new)
    rows = []
    for system in every:
        first, step = statistics.median(system.first), statistics.median(system.step)
        speed = system.weight_bytes / step
        rows.append(
            {
                "system": system.name,
                "first_token_s": first,
                "prefill_tok_s": batch * prompt / first,
                "decode_tok_s": batch / step,
                "GB_s": speed / 1e9,
                "of_read_bandwidth": speed / bandwidth,
                "times_the_first": step / statistics.median(every[0].step),
                "same_first_id": sum(
                    a[0] == b[0] for a, b in zip(system.ids, every[0].ids, strict=True)
                ),
            }
        )
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(v if isinstance(v, str) else f"{v:.4g}" for v in row.values()))
    setting = {"shape": shape, "batch": batch, "prompt": prompt, "new": new, "runs": runs}
    print(json.dumps({**setting, "read_GB_s": bandwidth / 1e9, "rows": rows}))


if __name__ == "__main__":
    fire.Fire(main)
