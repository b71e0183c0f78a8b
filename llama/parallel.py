"""The model-parallel group over fairscale: rank, size, and the collectives of tensor parallelism.

On one rank everything here is the identity and no process group is needed. Knows nothing about
which weights are split; `model.py` calls these where the communication happens.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs_init
from fairscale.nn.model_parallel import mappings
from torch import Tensor


def launched() -> bool:
    """Whether this process was started by torchrun (or anything that sets its environment)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def local_rank() -> int:
    """This process's number on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def initialize(model_parallel_size: int | None, device: torch.device) -> None:
    """Set up the model-parallel group; repeated calls with the same size do nothing.

    Args:
        model_parallel_size: ranks that share one model; None takes the whole world.
        device: nccl serves a CUDA device, gloo any other.

    Raises:
        ValueError: the size does not divide the world, or another size is already in use.
    """
    world = int(os.environ.get("WORLD_SIZE", 1)) if launched() else 1
    if dist.is_initialized():
        world = dist.get_world_size()
    wanted = world if model_parallel_size is None else model_parallel_size
    if wanted < 1 or world % wanted:
        raise ValueError(
            f"model_parallel_size {wanted} does not divide the {world} running process(es); "
            f"start them with: torchrun --nproc_per_node {max(wanted, 1)} YOUR_SCRIPT"
        )
    if fs_init.model_parallel_is_initialized():
        if size() != wanted:
            raise ValueError(
                f"this process already runs model_parallel_size {size()}; it cannot also run "
                f"{wanted}: build both models with one size"
            )
        return
    if world == 1 and not dist.is_initialized():
        return
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    with contextlib.redirect_stdout(sys.stderr):  # fairscale announces itself
        fs_init.initialize_model_parallel(wanted)


def _leave() -> None:
    """Close the group that we opened: gloo's threads abort an interpreter that ends under them."""
    if dist.is_initialized():
        fs_init.destroy_model_parallel()
        dist.destroy_process_group()


def size() -> int:
    """Number of ranks that share one model."""
    if not fs_init.model_parallel_is_initialized():
        return 1
    return int(fs_init.get_model_parallel_world_size())


def rank() -> int:
    """This process's rank in its model-parallel group."""
    if not fs_init.model_parallel_is_initialized():
        return 0
    return int(fs_init.get_model_parallel_rank())


def copy(x: Tensor) -> Tensor:
    """Identity; its gradient is summed over the ranks. Opens a split region."""
    return x if size() == 1 else mappings.copy_to_model_parallel_region(x)


def reduce(x: Tensor) -> Tensor:
    """Sum over the ranks. Closes a split region."""
    return x if size() == 1 else mappings.reduce_from_model_parallel_region(x)


def gather(x: Tensor) -> Tensor:
    """Concatenate the ranks' last dimensions."""
    return x if size() == 1 else mappings.gather_from_model_parallel_region(x)


def broadcast(x: Tensor) -> Tensor:
    """The group's first rank's `x`, on every rank."""
    if size() > 1:
        dist.broadcast(x, fs_init.get_model_parallel_src_rank(), fs_init.get_model_parallel_group())
    return x
