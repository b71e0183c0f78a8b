"""All-reduce between the GPUs of this machine, by nccl; in a rehearsal between two CPU ranks."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks.gpu.record import Run
from benchmarks.gpu.timing import wait

SIZES = {"8 KB, as a decoding step of 8B": 4096, "64 MiB": 32 << 20}  # elements in bf16


def run(run: Run) -> None:
    """As many ranks as there are GPUs."""
    gpus = run.device.type == "cuda"
    ranks = torch.cuda.device_count() if gpus else 2
    if ranks < 2:
        run.failed("nccl", "one GPU: not measured")
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        arguments = (ranks, folder, "nccl" if gpus else "gloo", run.sizes.rehearsal)
        multiprocessing.spawn(rank, arguments, ranks)
        for what, times, size in json.loads(out.read_text()):
            row = f"{ranks} ranks, {what}"
            run.figure(row, "all-reduce", "us", [t * 1e6 for t in times], "lower")
            moved = [2 * (ranks - 1) / ranks * size / t / 1e9 for t in times]
            run.figure(row, "bus bandwidth", "GB/s", moved, "higher")


def rank(number: int, ranks: int, folder: str, backend: str, small: bool) -> None:
    """Measure; rank 0 writes the times."""
    device = torch.device("cuda", number) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=number, world_size=ranks)
    results = []
    for what, elements in SIZES.items():
        n = min(elements, 4096) if small else elements
        x = torch.zeros(n, device=device, dtype=torch.bfloat16)  # other sums would overflow
        times = []
        for _ in range(7):
            dist.barrier()
            wait(device)
            start = time.perf_counter()
            for _ in range(10):
                dist.all_reduce(x)
            wait(device)
            times.append((time.perf_counter() - start) / 10)
        results.append((what, times[2:], x.nbytes))
    if number == 0:
        (Path(folder) / "figures.json").write_text(json.dumps(results))
    dist.destroy_process_group()
