"""The model-parallel group over fairscale: rank, size, and the collectives of tensor parallelism.

On one rank everything here is the identity and no process group is needed. Knows nothing about
which weights are split; `model.py` calls these where the communication happens.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import sys
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs_init
from fairscale.nn.model_parallel import mappings
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from llama.distributed import job

# Between steps a rank may wait for as long as another loads, or a person thinks.
UNHURRIED = timedelta(days=300)
_control: dist.ProcessGroup | None = None  # gloo, of the model-parallel ranks
_ranks = [0]  # of this model-parallel group, by their numbers in the world
_ended: job.Fault | None = None
_known = False  # whether that is the first cause


def initialize(model_parallel_size: int | None, device: torch.device) -> None:
    """Set up the model-parallel group; repeated calls with the same size do nothing.

    Args:
        model_parallel_size: ranks that share one model; None takes the whole world. The world
            may hold several such groups, each with a model of its own.
        device: nccl serves a CUDA device, gloo any other.

    Raises:
        ValueError: the size does not divide the world, another size is already in use, the
            device cannot communicate, or the ranks cannot meet.
        RankError: another rank failed.
    """
    world = dist.get_world_size() if dist.is_initialized() else job.environment().world
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
    if wanted > 1 and device.type not in ("cuda", "cpu"):
        raise ValueError(
            f'several ranks cannot share a model on {device.type}; build with device="cpu"'
        )
    with ends_job_on_error(several=True):
        _join(wanted, "nccl" if device.type == "cuda" else "gloo")


def _join(model_parallel_size: int, backend: str) -> None:
    global _control, _ranks
    if not dist.is_initialized():
        if not dist.is_backend_available(backend) or not dist.is_backend_available("gloo"):
            raise ValueError(
                f"this build of torch has no {backend}, which several ranks need; install one "
                'that has it, or build with device="cpu"'
            )
        job.rendezvous({"model_parallel_size": model_parallel_size, "backend": backend})
        me = job.environment()
        dist.init_process_group(
            backend,
            store=job.store(),
            rank=me.rank,
            world_size=me.world,
            timeout=job.timeout(),
        )
        atexit.register(_leave)
    with contextlib.redirect_stdout(sys.stderr):  # fairscale announces itself
        fs_init.initialize_model_parallel(model_parallel_size)
    # Groups do not take the timeout of the world.
    _set_pg_timeout(job.timeout(), fs_init.get_model_parallel_group())
    for first in range(0, dist.get_world_size(), model_parallel_size):
        ranks = list(range(first, first + model_parallel_size))
        group = dist.new_group(ranks, UNHURRIED, "gloo")
        if dist.get_rank() in ranks:
            _control, _ranks = group, ranks


def _leave() -> None:
    """Close the group that we opened: gloo's threads abort an interpreter that ends under them."""
    error = getattr(sys, "last_value", None)  # what ends this process, if anything
    if error is not None and _ended is None and dist.is_initialized():
        job.publish_fault(error)
    _close()


def _close() -> None:
    """Let go of all groups; with gloo the others then see at once that this rank has left."""
    global _control
    control, _control = _control, None
    if not dist.is_initialized():
        return
    if _ended is not None and dist.get_backend() != "gloo":
        # A broken nccl group may never be done; it ends with the process.
        if control is not None:
            dist.destroy_process_group(control)
        return
    fs_init.destroy_model_parallel()
    del control
    dist.destroy_process_group()


@contextlib.contextmanager
def ends_job_on_error(several: bool | None = None) -> Iterator[None]:
    """Whatever ends this on one rank ends the job on every rank: see `end_job`.

    Args:
        several: whether there are several ranks; None asks `size`.
    """
    if not (size() > 1 if several is None else several):
        yield
        return
    try:
        yield
    except BaseException as e:
        raise end_job(e) from (None if isinstance(e, (job.RankError, KeyboardInterrupt)) else e)


def end_job(error: BaseException) -> BaseException:
    """Leave the group because of an error; what to raise, of the same text on every rank.

    If the error is a collective's, it is another rank's fault that is looked for. An interrupt may
    end the search; the next call goes on with it.
    """
    global _ended, _known
    if _ended is not None and _known:
        return _ended.exception()
    traceback.clear_frames(error.__traceback__)  # whose locals hold groups, and so sockets
    fault = job.published_fault()
    if fault is None and not isinstance(error, job.Terminated) and not is_collective_error(error):
        fault = job.publish_fault(error)
    _ended = fault or _ended or job.make_fault(error)
    _close()
    if fault is None:
        fault = job.find_lost_rank(_ranks)
        if fault is None and isinstance(error, job.Terminated):
            return error
    _ended, _known = fault or _ended, True
    return _ended.exception()


def is_collective_error(error: BaseException) -> bool:
    """Whether it says no more than that ranks lost each other."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def size() -> int:
    """Number of ranks that share one model."""
    if _ended is not None:
        raise _ended.exception()
    if not fs_init.model_parallel_is_initialized():
        return 1
    return int(fs_init.get_model_parallel_world_size())


def rank() -> int:
    """This process's rank in its model-parallel group."""
    if not fs_init.model_parallel_is_initialized():
        return 0
    return int(fs_init.get_model_parallel_rank())


def copy_to_ranks(x: Tensor) -> Tensor:
    """Identity; its gradient is summed over the ranks. Opens a split region."""
    return x if size() == 1 else mappings.copy_to_model_parallel_region(x)


def reduce_from_ranks(x: Tensor) -> Tensor:
    """Sum over the ranks. Closes a split region."""
    return x if size() == 1 else mappings.reduce_from_model_parallel_region(x)


def max_over_ranks(x: Tensor) -> Tensor:
    """The largest of each number that a rank has. What is none (NaN) counts as infinite."""
    if size() > 1:
        x = x.masked_fill(x.isnan(), torch.inf)
        dist.all_reduce(x, dist.ReduceOp.MAX, fs_init.get_model_parallel_group())
    return x


def gather_from_ranks(x: Tensor) -> Tensor:
    """Concatenate the ranks' last dimensions."""
    return x if size() == 1 else mappings.gather_from_model_parallel_region(x)


def broadcast_from_first(x: Tensor) -> Tensor:
    """The group's first rank's `x`, on every rank."""
    if size() > 1:
        dist.broadcast(x, fs_init.get_model_parallel_src_rank(), fs_init.get_model_parallel_group())
    return x


def gather_json(value: Any) -> list[Any]:
    """What JSON can say, of every rank of the group, on all of them. Waits as long as it takes."""
    if size() == 1:
        return [value]
    with ends_job_on_error():
        data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(size())]
        dist.all_gather(lengths, torch.tensor([len(data)]), _control)
        padded = torch.zeros(int(max(lengths)), dtype=torch.uint8)
        padded[: len(data)] = data
        rows = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(rows, padded, _control)
        return [
            json.loads(bytes(row[: int(n)].tolist())) for row, n in zip(rows, lengths, strict=True)
        ]


def broadcast_json(value: Any) -> Any:
    """The group's first rank's value, which JSON can say, on every rank."""
    return gather_json(value if rank() == 0 else None)[0]


def check_same_on_ranks(facts: dict[str, Any]) -> None:
    """Raise a ValueError on every rank if they differ; it names the first fact that does."""
    job.check_equal(dict(zip(_ranks, gather_json(facts), strict=True)))


@contextlib.contextmanager
def fails_on_all_ranks() -> Iterator[None]:
    """What fails inside on one rank fails on all: its own error where all have the same.

    Raises:
        RankError: what happened to another rank. The group goes on.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    found = gather_json(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None and len(set(found)) == 1:
        raise error
    for number, text in zip(_ranks, found, strict=True):
        if text is not None:
            raise job.RankError(f"rank {number}: {text}") from error
