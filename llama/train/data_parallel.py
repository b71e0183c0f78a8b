"""The processes that train one model together, by torch's own DDP or FSDP2, or one alone.

Each process is a rank with rows of its own. Knows nothing about files or text.
"""

from __future__ import annotations

import atexit
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from llama.distributed import job


def _leave() -> None:
    """Close the group that we opened: gloo's threads abort an interpreter that ends under them."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train.

    Attributes:
        kind: "ddp" (each rank holds the model), "fsdp" (each holds a part of every weight), or
            None for one process.
    """

    kind: str | None
    device: torch.device
    rank: int = 0
    size: int = 1

    @staticmethod
    def join(kind: str | None, device: torch.device) -> Ranks:
        """Meet the other processes that torchrun started.

        Raises:
            ValueError: there are some and no `kind`, or a `kind` and no torchrun.
        """
        world = job.environment().world
        if kind is None:
            if world > 1:
                raise ValueError(f"{world} processes need --parallel ddp or --parallel fsdp")
            return Ranks(None, device)
        if not job.is_launched():
            raise ValueError(f"--parallel {kind} needs: torchrun --nproc_per_node N -m llama")
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            atexit.register(_leave)
        return Ranks(kind, device, dist.get_rank(), dist.get_world_size())

    def shard(self, module: nn.Module, layers: Sequence[nn.Module]) -> None:
        """With FSDP, leave this rank its part of every weight; layers are gathered one by one."""
        if self.kind == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.size,))
            for part in (*layers, module):
                fully_shard(part, mesh=mesh)

    def wrap(self, module: nn.Module) -> nn.Module:
        """With DDP, the module that averages gradients over the ranks; else the same module."""
        if self.kind != "ddp":
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=devices)

    def average_gradients(self, wrapped: nn.Module, wanted: bool) -> None:
        """Whether the next backward pass does; those before the last of an update need not."""
        if self.kind == "ddp":
            assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
            wrapped.require_backward_grad_sync = wanted
        elif self.kind == "fsdp":
            from torch.distributed.fsdp import FSDPModule

            assert isinstance(wrapped, FSDPModule)
            wrapped.set_requires_gradient_sync(wanted)

    def total(self, *values: float) -> list[float]:
        """The sum of each value over the ranks."""
        if self.kind is None:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        found: list[float] = sums.tolist()
        return found

    def wait(self) -> None:
        """For the other ranks to come here."""
        self.total(0.0)
