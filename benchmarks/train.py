"""Training beside transformers' LlamaForCausalLM: the same weights, batches and optimizer.

    python -m benchmarks.train
    python -m benchmarks.train --dim 512 --n_layers 8 --n_heads 8 --n_kv_heads 4 \
        --batch_size 10 --max_seq_len 256

The two alternate, one update each, and the order changes each time. The losses must agree. Prints
a table and one JSON line, which --out saves.

Shapes: B rows, T ids in a row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict

import torch
from torch import Tensor, nn

from benchmarks.flags import check_counts, check_file
from benchmarks.report import Figure, finish, make_result
from benchmarks.script import run_benchmark
from benchmarks.transformers_peer import transformers_model
from llama.distributed.device import pick_device
from llama.layers.optimize import optimize
from llama.model import Transformer
from llama.train.objective import Objective
from llama.train.optimizer import initialize, make_optimizer, parameter_groups
from llama.train.settings import Settings

VOCABULARY = 68  # Tiny Shakespeare's characters, and three special tokens
TOLERANCE = 0.02  # absolute, of the losses after the last update


Update = Callable[[Tensor], float]


def updates(
    module: nn.Module, loss_of: Callable[[Tensor], Tensor], settings: Settings, device: torch.device
) -> Update:
    """A function: (B, T + 1) ids -> the loss on them, after which the weights are updated."""
    optimizer = make_optimizer(parameter_groups(module, settings), settings)
    bf16 = settings.dtype == "bfloat16"

    def update(ids: Tensor) -> float:
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            loss = loss_of(ids)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(module.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())  # waits for the device

    return update


def systems(settings: Settings, vocab_size: int, device: torch.device) -> dict[str, Update]:
    """Both systems with the same initial weights."""
    model = Transformer(settings.model_args(vocab_size)).to(device)
    optimize(model, exact=True)
    initialize(model, settings.seed)
    theirs, ours = transformers_model(model), Objective(model)

    def their_loss(ids: Tensor) -> Tensor:
        # `shift_labels` are the targets; it wants `labels` too, to compute a loss at all.
        shifted = ids[:, 1:].contiguous()
        output = theirs(input_ids=ids[:, :-1], shift_labels=shifted, labels=ids[:, :-1])
        loss: Tensor = output.loss
        return loss

    def our_loss(ids: Tensor) -> Tensor:
        loss: Tensor = ours(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
        return loss

    return {
        "llama3": updates(ours, our_loss, settings, device),
        "transformers": updates(theirs, their_loss, settings, device),
    }


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
    out: str | None = None,
) -> None:
    """Time `runs` updates of each system, after one that does not count.

    Args:
        dtype: of the matrix multiplications: float32, or bfloat16 by autocast.
        out: a JSON file to write.
    """
    check_counts(runs=runs)
    check_file("out", out, ".json")
    settings = Settings(
        dim=dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, batch_size=batch_size,
        max_seq_len=max_seq_len, dtype=dtype,
    )  # fmt: skip
    device = pick_device(None)
    compared = systems(settings, vocab_size, device)
    generator = torch.Generator().manual_seed(1)
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    losses: dict[str, float] = {}
    for run in range(runs + 1):
        shape = (batch_size, max_seq_len + 1)
        ids = torch.randint(0, vocab_size, shape, generator=generator).to(device)
        for name in sorted(compared, reverse=run % 2 == 1):
            start = time.perf_counter()
            losses[name] = compared[name](ids)
            seconds[name].append(time.perf_counter() - start)
    if not abs(losses["llama3"] - losses["transformers"]) <= TOLERANCE:  # also true of NaN
        raise ValueError(f"the losses after {runs + 1} updates differ: {losses}")
    tokens = batch_size * max_seq_len
    figures = [
        Figure(name, "training", "tok/s", [tokens / t for t in times[1:]], better="higher")
        for name, times in seconds.items()
    ]
    medians = [statistics.median(times[1:]) for times in seconds.values()]
    ratio = medians[1] / medians[0]
    figures.append(Figure("llama3 / transformers", "training", "", [ratio], better="higher"))
    figures += [Figure(name, "last loss", "nat", [loss]) for name, loss in losses.items()]
    name = f"train dim {dim}, {n_layers} layers, {dtype}"
    finish(make_result(name, asdict(settings) | {"runs": runs}, figures), out)


if __name__ == "__main__":
    run_benchmark(main, "train")
