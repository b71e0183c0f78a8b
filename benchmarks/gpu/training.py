"""A training step of the 1B shape, as `llama3 train` makes it: fp32 weights, bf16 by autocast."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import matmul_ceiling
from benchmarks.gpu.models import random_model
from benchmarks.gpu.profiling import profile
from benchmarks.gpu.record import Run
from benchmarks.train import updates
from llama.train.objective import Objective, prepare_model
from llama.train.settings import Settings

STEPS = 5


def run(run: Run) -> None:
    """Measure the first number of rows that fits the memory."""
    sizes = run.sizes
    ceiling = matmul_ceiling(run, "1b")
    for rows in sizes.train_rows:
        row = f"{rows} x {sizes.train_length} tokens"
        if run.attempt(row, measure, run, row, rows, ceiling, least=15):
            return


def measure(run: Run, row: str, rows: int, ceiling: float) -> bool:
    sizes, device, length = run.sizes, run.device, run.sizes.train_length
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = random_model(sizes.train_shape, 1, length, device, torch.float32).train()
    prepare_model(model)
    objective = Objective(model)
    parameters = sum(w.numel() for w in model.parameters()) - model.tok_embeddings.weight.numel()

    def loss_of(ids: Tensor) -> Tensor:
        loss: Tensor = objective(ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
        return loss

    settings = Settings(dim=model.params.dim, dtype="bfloat16", lr=1e-4)
    update = updates(objective, loss_of, settings, device)
    generator = torch.Generator(device).manual_seed(1)
    shape, times, losses = (rows, length + 1), [], []
    for _ in range(STEPS + 2):
        ids = torch.randint(0, model.vocab_size, shape, generator=generator, device=device)
        start = time.perf_counter()
        losses.append(update(ids))
        times.append(time.perf_counter() - start)
    times, tokens = times[2:], rows * length
    rates = [6.0 * parameters * tokens / t / 1e12 for t in times]
    run.figure(row, "training", "tok/s", [tokens / t for t in times], "higher")
    run.figure(row, "step", "s", [statistics.median(times)], "lower")
    run.figure(row, "6 x parameters x tokens", "TFLOP/s", rates, "higher")
    run.figure(row, "of matmul", "", [rate / ceiling for rate in rates], "higher")
    run.figure(row, "last loss", "nat", losses[-1:])
    run.peak_memory(row)
    run.attempt("profile", profile, run, row, lambda: update(ids), 1)
    return True
