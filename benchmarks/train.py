"""Training beside transformers' LlamaForCausalLM: the same weights, batches and optimizer.

    python -m benchmarks.train
    python -m benchmarks.train --dim 512 --n_layers 8 --n_heads 8 --n_kv_heads 4 \
        --batch_size 10 --max_seq_len 256

The two take turns, an update each, and the order changes each time. Prints one JSON line: the
median tokens per second of each, the ratio, and the losses, which must agree.

Shapes: B rows, T ids a row.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from benchmarks.report import machine
from benchmarks.transformers_peer import config_of
from llama.checkpoints.formats.hf_config import hf_name
from llama.checkpoints.formats.hf_export import halve
from llama.checkpoints.load import pick_device
from llama.commands.script import run_script
from llama.model import Transformer
from llama.train.loop import Objective
from llama.train.optimizer import initialize, make_optimizer
from llama.train.settings import Settings

VOCABULARY = 68  # Tiny Shakespeare's characters, and three special tokens
TOLERANCE = 0.02  # of the losses after some updates


def transformers_model(ours: Transformer) -> nn.Module:
    """With copies of our weights."""
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM(config_of(ours.params)).to(ours.norm.weight.device)
    weights = {
        hf_name(name): halve(w, ours.params.head_dim) if name.split(".")[-2] in ("wq", "wk") else w
        for name, w in ours.state_dict().items()
    }
    theirs.load_state_dict(weights, strict=True)
    model: nn.Module = theirs.train()
    return model


def updates(
    module: nn.Module, loss_of: Callable[[Tensor], Tensor], settings: Settings, device: torch.device
) -> Callable[[Tensor], float]:
    """(B, T + 1) ids -> the loss, after one update on them."""
    optimizer = make_optimizer(module, settings)
    bf16 = settings.dtype == "bfloat16"

    def update(ids: Tensor) -> float:
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            loss = loss_of(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())  # waits for the device

    return update


def main(
    dim: int = 128,
    n_layers: int = 4,
    n_heads: int = 4,
    n_kv_heads: int | None = None,
    batch_size: int = 12,
    max_seq_len: int = 64,
    runs: int = 50,
    dtype: str = "float32",
    vocab_size: int = VOCABULARY,
) -> None:
    """Time `runs` updates of each, after one that is not counted.

    Args:
        dtype: float32, or bfloat16 for products.
    """
    if type(runs) is not int or runs < 1:
        raise ValueError(f"--runs must be 1 or more, not {runs!r}")
    settings = Settings(
        dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, batch_size=batch_size,
        max_seq_len=max_seq_len, dtype=dtype,
    )  # fmt: skip
    device = pick_device(None)
    model = Transformer(settings.model_args(vocab_size)).to(device)
    initialize(model, settings.seed)
    theirs, ours = transformers_model(model), Objective(model, recompute=False)
    systems = {
        "llama3": updates(ours, lambda ids: ours(ids[:, :-1], ids[:, 1:]), settings, device),
        "transformers": updates(
            theirs,
            # It shifts the labels itself, and ignores those of -100: the last has no target.
            lambda ids: (
                theirs(
                    input_ids=ids[:, :-1], shift_labels=ids[:, 1:].contiguous(), labels=ids[:, :-1]
                ).loss
            ),
            settings,
            device,
        ),
    }
    generator = torch.Generator().manual_seed(1)
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    losses: dict[str, float] = {}
    for run in range(runs + 1):
        shape = (batch_size, max_seq_len + 1)
        ids = torch.randint(0, vocab_size, shape, generator=generator).to(device)
        for name in sorted(systems, reverse=run % 2 == 1):
            start = time.perf_counter()
            losses[name] = systems[name](ids)
            seconds[name].append(time.perf_counter() - start)
    speed = {
        name: batch_size * max_seq_len / statistics.median(times[1:])
        for name, times in seconds.items()
    }
    difference = abs(losses["llama3"] - losses["transformers"])
    if not difference <= TOLERANCE:
        raise ValueError(f"the losses after {runs + 1} updates differ: {losses}")
    print(
        json.dumps(
            {
                "tokens_per_s": {name: round(value, 1) for name, value in speed.items()},
                "ratio": round(speed["llama3"] / speed["transformers"], 3),
                "losses": losses,
                "machine": machine(),
            }
        )
    )


if __name__ == "__main__":
    run_script(main, "benchmarks.train")
