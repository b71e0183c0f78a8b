"""`Task`: what the training loop must know about a kind of training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from llama.train.batch import Batch
from llama.train.data_parallel import DataParallel
from llama.train.objective import Objective
from llama.train.settings import TrainerSettings


class Task(Protocol):
    """Pre-training, fine-tuning, ...: a model to train, its batches, and what becomes of it.

    Every rank has the same task. Names of weights are those of the model's state dict.

    Attributes:
        settings: how to train.
        steps: updates.
        out: the folder of the run. `out`/train/settings.json exists.
        evaluates_first: evaluate once before the first update.
        result_file: a file that `save_best` writes. A resumed run must still have it.
    """

    @property
    def settings(self) -> TrainerSettings: ...
    @property
    def steps(self) -> int: ...
    @property
    def out(self) -> Path: ...
    @property
    def evaluates_first(self) -> bool: ...
    @property
    def result_file(self) -> Path: ...

    def objective(self, ranks: DataParallel) -> Objective:
        """The loss, with its weights on the device, sharded for FSDP.

        Only parameters with `requires_grad` are trained and saved.
        """

    def parameter_groups(self, objective: Objective) -> list[dict[str, Any]]:
        """AdamW's groups, each with `lr_scale`; see `optimizer.parameter_groups`."""

    def batches(self, step: int, rank: int, ranks: int) -> list[Batch]:
        """A rank's micro-batches of an update, on the CPU: as many on every rank.

        Depends on the arguments alone, so that resuming needs no state.
        """

    def target_count(self, step: int, ranks: int) -> int | None:
        """What the loss of an update is divided by; None: the sum of `Objective.count`."""

    def validation(self) -> Iterator[Batch] | None:
        """All batches to evaluate, the same on every rank; None: there are none."""

    def save_best(self, weights: dict[str, Tensor]) -> None:
        """Write the result of training, on rank 0. `weights`: the trained ones, on the CPU."""

    def sample(self, weights: dict[str, Tensor]) -> str:
        """Text to print after an evaluation, on rank 0."""
