"""A small `Task` on rows of unequal lengths, and a job of several ranks that trains it.

    torchrun --nproc_per_node 2 -m tests.train.tiny_task FOLDER

writes FOLDER/{ddp,fsdp}-METHOD.pt, the gradients of the first update, and for RUNS trains in
FOLDER/{ddp,fsdp}-METHOD with a stop half way.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llama import ModelArgs, Transformer
from llama.layers.lora import LoRAConfig, add_lora, fill, initialize_lora, lora_modules
from llama.layers.optimize import quantize_model
from llama.train.batch import IGNORED, Batch
from llama.train.data_parallel import DataParallel
from llama.train.loop import Result, Trainer, run_task
from llama.train.objective import Objective, prepare_model
from llama.train.optimizer import parameter_groups
from llama.train.settings import TrainerSettings
from llama.train.state import record_settings, save_state
from tests.models import random_weights

PARAMS: dict[str, Any] = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 61, "multiple_of": 16
}  # fmt: skip
ADAPTERS = ("lora", "int4", "bf16")
METHODS = ("full", "tied", "embeddings", "lora", "int4")
RUNS = (("ddp", "int4"), ("fsdp", "tied"), ("fsdp", "embeddings"), ("fsdp", "bf16"))
UPDATE = 8  # rows of an update
SETTINGS = TrainerSettings(
    batch_size=UPDATE, lr=0.01, warmup=0, final_lr=1.0, eval_every=2, dtype="float32"
)


def row(step: int, number: int) -> tuple[list[int], list[int]]:
    """Ids and targets of a sample of 2 to 15 tokens; few of an early row's are trained on."""
    rng = random.Random(f"{step} {number}")
    ids = [rng.randrange(61) for _ in range(rng.randint(2, 15))]
    shown = [i if rng.random() < (number + 1) / UPDATE else IGNORED for i in ids[1:]]
    return ids, [*shown, IGNORED]


def batch_of(rows: list[tuple[list[int], list[int]]], packed: bool) -> Batch:
    """Rows padded on the right, or all in one row."""
    if packed:
        tokens, targets = (torch.tensor([[*chain(*part)]]) for part in zip(*rows, strict=True))
        return Batch(tokens, targets, tuple(len(ids) for ids, _ in rows))
    longest = max(len(ids) for ids, _ in rows)
    padded = [
        (ids + [0] * (longest - len(ids)), shown + [IGNORED] * (longest - len(ids)))
        for ids, shown in rows
    ]
    tokens, targets = (torch.tensor(part) for part in zip(*padded, strict=True))
    return Batch(tokens, targets)


class TinyTask:
    """Trains a random model: all of it, or adapters of it."""

    evaluates_first = True

    def __init__(
        self,
        out: Path,
        method: str,
        settings: TrainerSettings = SETTINGS,
        *,
        steps: int = 4,
        dropout: float = 0.0,
        packed: bool = False,
    ):
        self.out, self.method, self.settings, self.steps = out, method, settings, steps
        self.dropout, self.packed = dropout, packed
        self.result_file = out / "best.pt"

    def objective(self, ranks: DataParallel) -> Objective:
        model = Transformer(ModelArgs(**PARAMS, max_seq_len=16))
        model.load_state_dict(random_weights(**PARAMS))
        if self.method == "tied":
            model.output.weight = model.tok_embeddings.weight
        if self.method not in ("full", "tied"):
            model.requires_grad_(False)
        if self.method == "embeddings":
            model.tok_embeddings.requires_grad_(True)
            model.output.requires_grad_(True)
        if self.method == "bf16":  # a frozen base in bf16, adapters in fp32
            model.to(torch.bfloat16)
        if self.method in ADAPTERS:
            if self.method == "int4":
                quantize_model(model, "int4")
            add_lora(model, LoRAConfig(rank=4, dropout=self.dropout))
        prepare_model(model, self.settings.recompute)
        objective = Objective(model, self.settings.seed)
        ranks.shard(objective, list(model.layers))
        initialize_lora(model, seed=2)
        for i, module in enumerate(lora_modules(model)):  # else A has no gradient at first
            generator = torch.Generator().manual_seed(i)
            with torch.no_grad():
                fill(module.lora_b, torch.randn(module.lora_b.shape, generator=generator) / 8)
        return objective

    def parameter_groups(self, objective: Objective) -> list[dict[str, Any]]:
        return parameter_groups(objective, self.settings, {"lora_b": 4.0})

    def batches(self, step: int, rank: int, ranks: int) -> list[Batch]:
        s = self.settings
        assert s.batch_size * s.accumulate * ranks == UPDATE
        firsts = range(rank * s.accumulate * s.batch_size, UPDATE, s.batch_size)[: s.accumulate]
        rows = [[row(step, i) for i in range(first, first + s.batch_size)] for first in firsts]
        return [batch_of(part, self.packed) for part in rows]

    def target_count(self, step: int, ranks: int) -> int | None:
        return None

    def validation(self) -> Iterator[Batch] | None:
        return (batch_of([row(-1 - i, 6), row(-1 - i, 7)], self.packed) for i in range(3))

    def save_best(self, weights: dict[str, Tensor]) -> None:
        save_state(self.result_file, weights)

    def sample(self, weights: dict[str, Tensor]) -> str:
        return f"{len(weights)} trained weights"


def gradients(task: TinyTask, ranks: DataParallel) -> dict[str, Tensor]:
    """Gradients of the first update by name, of whole parameters."""
    trainer = Trainer(task, ranks)
    batches = task.batches(0, ranks.rank, ranks.size)
    [total] = ranks.sum_over_ranks(sum(batch.target_count for batch in batches))
    trainer.backward(0, batches, int(total))
    found = {}
    for name, w in trainer.objective.model.named_parameters():
        if w.grad is not None:
            found[name] = w.grad.full_tensor() if isinstance(w.grad, DTensor) else w.grad
    return found


def run(task: TinyTask, ranks: DataParallel, resume: bool = False) -> Result:
    """Train in a new folder, or go on there."""
    if not resume and ranks.rank == 0:
        task.out.mkdir(parents=True)
        record_settings(task.out, task.settings, ranks.size, "")
    ranks.barrier()
    return run_task(task, ranks, resume=resume)


def main(folder: Path) -> None:
    started = DataParallel.initialize("ddp", torch.device("cpu"))
    settings = replace(SETTINGS, batch_size=2, accumulate=2)
    for kind in ("ddp", "fsdp"):
        ranks = replace(started, kind=kind)
        for method in METHODS:
            found = gradients(TinyTask(folder, method, settings), ranks)
            if ranks.rank == 0:
                torch.save(found, folder / f"{kind}-{method}.pt")
    for kind, method in RUNS:
        ranks, out = replace(started, kind=kind), folder / f"{kind}-{method}"
        run(TinyTask(out, method, replace(settings, recompute=True), steps=2), ranks)
        run(TinyTask(out, method, replace(settings, recompute=True)), ranks, resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
