"""The model-parallel group over fairscale: rank, size, and the collectives of tensor parallelism.

On one rank everything here is the identity and no process group is needed. Knows nothing about
which weights are split; `model.py` calls these where the communication happens.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from llama.distributed import groups, job, shared_memory

# Between steps a rank may wait without limit: another one loads, or a person types.
NO_TIMEOUT = timedelta(days=300)
RELEASE_WITHIN = 0.1  # seconds in which gloo's threads let go of tensors
_control: dist.ProcessGroup | None = None  # gloo, of the model-parallel ranks, for `gather_json`
_ranks = [0]  # the model-parallel group, as ranks of the world
_fault: job.Fault | None = None  # why the group was closed; None while it works
_fault_is_final = False  # whether the search for the first cause is complete


def initialize(model_parallel_size: int | None, device: torch.device) -> None:
    """Set up the model-parallel group; repeated calls with the same size do nothing.

    Args:
        model_parallel_size: ranks that share one model; None means all. With fewer than all, each
            group of so many consecutive ranks has its own model.
        device: CUDA devices communicate through nccl, others through gloo.

    Raises:
        ValueError: the size does not divide the number of ranks, another size is in use, the
            device cannot communicate, or a rank did not start.
        RankError: another rank failed.
    """
    world = dist.get_world_size() if dist.is_initialized() else job.environment().world
    wanted = world if model_parallel_size is None else model_parallel_size
    if wanted < 1 or world % wanted:
        raise ValueError(
            f"model_parallel_size {wanted} does not divide the {world} running process(es); "
            f"start them with: torchrun --nproc_per_node {max(wanted, 1)} YOUR_SCRIPT"
        )
    if groups.is_initialized():
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
    with ends_job_on_error(enabled=True):
        _create_groups(wanted, "nccl" if device.type == "cuda" else "gloo")


def _create_groups(model_parallel_size: int, backend: str) -> None:
    global _control, _ranks
    if not groups.is_installed():
        raise ImportError("several ranks need fairscale: pip install fairscale")
    if not dist.is_initialized():
        if not dist.is_backend_available(backend) or not dist.is_backend_available("gloo"):
            raise ValueError(
                f"this build of torch has no {backend}, which several ranks need; install one "
                'that has it, or build with device="cpu"'
            )
        job.rendezvous({"model_parallel_size": model_parallel_size, "backend": backend})
        launch = job.environment()
        dist.init_process_group(
            backend,
            store=job.store(),
            rank=launch.rank,
            world_size=launch.world,
            timeout=job.timeout(),
        )
        close_at_exit()
    with contextlib.redirect_stdout(sys.stderr):  # fairscale prints
        groups.initialize.initialize_model_parallel(model_parallel_size)
    # New groups do not inherit the timeout of `init_process_group`.
    _set_pg_timeout(job.timeout(), groups.initialize.get_model_parallel_group())
    for first in range(0, dist.get_world_size(), model_parallel_size):
        ranks = list(range(first, first + model_parallel_size))
        group = dist.new_group(ranks, NO_TIMEOUT, "gloo")
        if dist.get_rank() in ranks:
            _control, _ranks = group, ranks


def close_at_exit() -> None:
    """Close the process group when the interpreter exits; gloo's threads would abort it.

    An uncaught exception is published as the job's fault first.
    """
    atexit.register(_leave)


def _leave() -> None:
    error = getattr(sys, "last_value", None)  # the uncaught exception, if any
    if error is not None and _fault is None and dist.is_initialized():
        job.publish_fault(error)
    uses_gloo = dist.is_initialized() and dist.get_backend() == "gloo"
    _close_groups()
    if uses_gloo:
        # DDP and FSDP keep the group's threads. One that still has to let go of the tensors of the
        # last collective needs the interpreter, and aborts the process where that has ended.
        time.sleep(RELEASE_WITHIN)


def _close_groups() -> None:
    """Destroy all groups. Over gloo, waiting ranks then fail at once instead of timing out."""
    global _control
    shared_memory.leave()
    control, _control = _control, None
    if not dist.is_initialized():
        return
    if _fault is not None and dist.get_backend() != "gloo":
        # Destroying a broken nccl group may block; it ends with the process.
        if control is not None:
            dist.destroy_process_group(control)
        return
    if groups.initialize is not None:
        groups.initialize.destroy_model_parallel()
    del control
    dist.destroy_process_group()


@contextlib.contextmanager
def ends_job_on_error(enabled: bool | None = None) -> Iterator[None]:
    """A block in which an exception on one rank ends the job on every rank; see `end_job`.

    Args:
        enabled: None means wherever `size` is more than 1.
    """
    if not (size() > 1 if enabled is None else enabled):
        yield
        return
    try:
        yield
    except BaseException as e:
        raise end_job(e) from (None if isinstance(e, (job.RankError, KeyboardInterrupt)) else e)


def end_job(error: BaseException) -> BaseException:
    """Close the groups because of `error`; return the exception to raise, the same on every rank.

    If `error` comes from a collective, another rank failed first, and this finds which. If an
    interrupt ends the search, the next call resumes it.
    """
    global _fault, _fault_is_final
    if _fault is not None and _fault_is_final:
        return _fault.exception()
    traceback.clear_frames(error.__traceback__)  # their locals keep groups, and so sockets, open
    fault = job.published_fault()
    if fault is None and not isinstance(error, job.Terminated) and not is_collective_error(error):
        fault = job.publish_fault(error)
    _fault = fault or _fault or job.make_fault(error)
    _close_groups()
    if fault is None:
        fault = job.find_lost_rank(_ranks)
        if fault is None and isinstance(error, job.Terminated):
            return error
    _fault, _fault_is_final = fault or _fault, True
    return _fault.exception()


def is_collective_error(error: BaseException) -> bool:
    """Whether a collective raised `error`, so that another rank is the cause."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    )


def size() -> int:
    """Number of ranks that share one model.

    Raises:
        RankError: the job has ended because of a fault.
    """
    if _fault is not None:
        raise _fault.exception()
    if not groups.is_initialized():
        return 1
    return int(groups.initialize.get_model_parallel_world_size())


def rank() -> int:
    """This process's rank in its model-parallel group."""
    if not groups.is_initialized():
        return 0
    return int(groups.initialize.get_model_parallel_rank())


def share_sums(available: bool) -> None:
    """Let ranks on one machine exchange tensors through shared memory from now on, if they can.

    All ranks call it at the same time.

    Args:
        available: whether this rank has loaded the operators.
    """
    if size() > 1:
        seconds = job.timeout().total_seconds()
        shared_memory.join(rank(), size(), seconds, gather_json, available)


def copy_to_ranks(x: Tensor) -> Tensor:
    """Identity, whose gradient is summed over the ranks; before linears with split outputs."""
    return x if size() == 1 else groups.mappings.copy_to_model_parallel_region(x)


def reduce_from_ranks(x: Tensor) -> Tensor:
    """Sum over the ranks (all-reduce); after linears with split inputs."""
    if size() == 1:
        return x
    if shared := shared_memory.for_sum(x):
        return shared.sum(x)
    y: Tensor = groups.mappings.reduce_from_model_parallel_region(x)
    return y


def max_over_ranks(x: Tensor) -> Tensor:
    """Elementwise maximum over the ranks. NaN counts as infinity."""
    if size() > 1:
        x = x.masked_fill(x.isnan(), torch.inf)
        dist.all_reduce(x, dist.ReduceOp.MAX, groups.initialize.get_model_parallel_group())
    return x


def gather_from_ranks(x: Tensor) -> Tensor:
    """Concatenate the ranks' tensors along the last dimension (all-gather)."""
    if size() == 1:
        return x
    if shared := shared_memory.for_tensor(x):
        return shared.stack(x).movedim(0, -2).flatten(-2)
    y: Tensor = groups.mappings.gather_from_model_parallel_region(x)
    return y


def broadcast_from_first(x: Tensor) -> Tensor:
    """Overwrite `x` by that of the group's first rank; return it."""
    if size() > 1 and (shared := shared_memory.for_tensor(x)):
        x.copy_(shared.stack(x)[0])
    elif size() > 1:
        first = groups.initialize.get_model_parallel_src_rank()
        dist.broadcast(x, first, groups.initialize.get_model_parallel_group())
    return x


def gather_json(value: Any) -> list[Any]:
    """Every rank's `value`, in the order of ranks, on every rank. Waits without a timeout.

    Args:
        value: anything that JSON can represent.
    """
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
    """The JSON value of the group's first rank, on every rank. Waits without a timeout."""
    return gather_json(value if rank() == 0 else None)[0]
