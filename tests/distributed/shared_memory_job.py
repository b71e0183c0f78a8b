"""What test_shared_memory.py runs on two ranks. Each prints one line of JSON.

torchrun --nproc_per_node 2 tests/distributed/shared_memory_job.py CASE
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llama.distributed import groups, job, shared_memory, tensor_parallel
from llama.layers import kernels

# One number; a decoding step; none at all; more than one piece, and not whole ones.
SHAPES = [(1,), (1, 2048), (0, 4), (3, 100_001)]


def equal_to_gloo() -> dict[str, Any]:
    """Names of the differences from the process group, and a digest of the results."""
    torch.manual_seed(tensor_parallel.rank())
    wrong: list[str] = []
    digest = 0.0
    group = groups.initialize.get_model_parallel_group()
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            x = torch.randn(shape).to(dtype)
            before, expected = x.clone(), x.clone()
            dist.all_reduce(expected, group=group)
            parts = [torch.empty_like(x) for _ in range(2)]
            dist.all_gather(parts, x, group)
            results: list[tuple[str, Tensor, Tensor]] = [
                ("sum", tensor_parallel.reduce_from_ranks(x), expected),
                ("gather", tensor_parallel.gather_from_ranks(x), torch.cat(parts, -1)),
                ("unchanged", x, before),
                ("broadcast", tensor_parallel.broadcast_from_first(x.clone()), parts[0]),
            ]
            wrong += [f"{n} {dtype} {shape}" for n, a, b in results if not torch.equal(a, b)]
            digest += float(results[0][1].double().sum())
    return {"wrong": wrong, "digest": digest, "ids": _broadcast_ids()}


def _broadcast_ids() -> list[int]:
    """Integers, as the engine broadcasts them."""
    ids = torch.tensor([7, 2**40]) * (1 + tensor_parallel.rank())
    return [int(i) for i in tensor_parallel.broadcast_from_first(ids)]


def other_shapes() -> dict[str, Any]:
    """The errors for tensors that differ between the ranks; then a sum that works."""
    own, errors = tensor_parallel.rank(), []
    for x in (
        torch.zeros(2 + own),
        torch.zeros(6).view(2 + own, -1),
        torch.zeros(4, dtype=(torch.float32, torch.bfloat16)[own]),
        torch.zeros(300_000 * own + 1),
    ):
        try:
            tensor_parallel.reduce_from_ranks(x)
        except RuntimeError as e:
            errors.append(str(e).splitlines()[0])
    return {"errors": errors, "sum": tensor_parallel.reduce_from_ranks(torch.ones(2)).tolist()}


def other_ends(how: str) -> dict[str, Any]:
    """How a rank learns that the other one does not come."""
    if tensor_parallel.rank() == 1:
        if how == "killed":
            print(json.dumps({"rank": 1}), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "leaves":
            shared_memory.leave()
        time.sleep(3 if how == "late" else 0)
        return {}
    start = time.monotonic()
    try:
        tensor_parallel.reduce_from_ranks(torch.zeros(3))
    except RuntimeError as e:
        known = tensor_parallel.is_collective_error(e)
        return {"error": str(e).splitlines()[0], "known": known, "s": time.monotonic() - start}
    return {"error": None}


def main() -> None:
    tensor_parallel.initialize(None, torch.device("cpu"))
    tensor_parallel.share_sums(kernels.load())
    assert shared_memory._joined is not None
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "equal": equal_to_gloo,
        "shapes": other_shapes,
        "killed": lambda: other_ends("killed"),
        "leaves": lambda: other_ends("leaves"),
        "late": lambda: other_ends("late"),
    }
    found = cases[sys.argv[1]]()
    print(json.dumps({"rank": job.environment().rank} | found), flush=True)
    os._exit(0)  # without the groups, one of which may be broken


if __name__ == "__main__":
    main()
