"""Data-parallel training: one process, or several with torch's DDP or FSDP2.

Each rank trains on its own rows of a batch. Knows nothing about files or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from llama.distributed import job, tensor_parallel


@dataclass(frozen=True)
class DataParallel:
    """This process's rank among those that train, and the collectives of training.

    Attributes:
        kind: "ddp" (each rank has the whole model), "fsdp" (each has a shard of every weight), or
            None for a single process.
    """

    kind: str | None
    device: torch.device
    rank: int = 0
    size: int = 1

    @staticmethod
    def initialize(kind: str | None, device: torch.device) -> DataParallel:
        """Set up the process group of the ranks that torchrun started.

        Raises:
            ValueError: several processes without a `kind`, a `kind` without torchrun, or no rank 0
                answers.
        """
        launch = job.environment()
        if kind is None:
            if launch.world > 1:
                raise ValueError(f"{launch.world} processes need --parallel ddp or --parallel fsdp")
            return DataParallel(None, device)
        if not job.is_launched():
            raise ValueError(f"--parallel {kind} needs: torchrun --nproc_per_node N -m llama")
        if not dist.is_initialized():
            backend = "nccl" if device.type == "cuda" else "gloo"
            if launch.world == 1:
                dist.init_process_group(backend)
            else:
                dist.init_process_group(
                    backend, store=job.store(), rank=launch.rank, world_size=launch.world
                )
            tensor_parallel.close_at_exit()
        return DataParallel(kind, device, dist.get_rank(), dist.get_world_size())

    def shard(self, module: nn.Module, layers: Sequence[nn.Module]) -> None:
        """With FSDP, keep this rank's shard of every weight; each of `layers` is one FSDP unit."""
        if self.kind == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.size,))
            for unit in (*layers, module):
                fully_shard(unit, mesh=mesh)

    def wrap(self, module: nn.Module) -> nn.Module:
        """With DDP, a wrapper that averages gradients over the ranks; otherwise the module."""
        if self.kind != "ddp":
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        wrapped = nn.parallel.DistributedDataParallel(module, device_ids=devices)
        wrapped.broadcast_buffers = False  # those of quantized weights do not change
        return wrapped

    def set_gradient_sync(self, wrapped: nn.Module, enabled: bool) -> None:
        """Whether the next backward pass averages gradients over the ranks.

        Only the last of an update's accumulated batches needs to.
        """
        if self.kind == "ddp":
            assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
            wrapped.require_backward_grad_sync = enabled
        elif self.kind == "fsdp":
            from torch.distributed.fsdp import FSDPModule

            assert isinstance(wrapped, FSDPModule)
            wrapped.set_requires_gradient_sync(enabled)

    def reshard(self, module: nn.Module) -> None:
        """With FSDP, keep this rank's shards only, after a forward pass without a backward pass."""
        if self.kind == "fsdp":
            from torch.distributed.fsdp import FSDPModule

            assert isinstance(module, FSDPModule)
            module.reshard()

    def sum_over_ranks(self, *values: float) -> list[float]:
        """The sum of each value over the ranks."""
        if self.kind is None:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        totals: list[float] = sums.tolist()
        return totals

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        self.sum_over_ranks(0.0)
