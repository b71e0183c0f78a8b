"""The training loop over a `Task`: evaluation, saving, resuming, signals, on one or several ranks.

Knows neither models nor data.
"""

from __future__ import annotations

import math
import signal
import textwrap
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llama.common.progress import progress, say
from llama.train.batch import Batch
from llama.train.data_parallel import DataParallel
from llama.train.objective import compute_dtype
from llama.train.optimizer import make_optimizer, set_learning_rate
from llama.train.report import Report
from llama.train.signals import DeferredSignals
from llama.train.state import (
    gather_state,
    gather_weights,
    load_state,
    lock_run,
    save_state,
    set_state,
)
from llama.train.task import Task

LOSSES = {"training": "train_loss", "validation": "val_loss"}  # as printed: key of a line


@dataclass
class Result:
    """How a training run ended.

    Attributes:
        step: updates made, counted from the start of the run.
        best_step, best_loss: step and loss of the checkpoint in the folder. The loss is the lowest
            validation loss; without a validation split, the training loss at the last evaluation.
        signal: the number of the signal that stopped the run early, or None.
    """

    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    signal: int | None = None


def read_result(path: Path, found: dict[str, Any]) -> Result:
    """The `Result` in a training state that was read from `path`.

    Raises:
        ValueError: it is damaged.
    """
    kinds = {"step": int, "best_step": int, "best_loss": float, "signal": type(None)}
    if {name: type(value) for name, value in found.items()} != kinds:
        raise ValueError(f"{path} is damaged; start a new run (the result is {found})")
    return Result(**found)


def run_task(
    task: Task, ranks: DataParallel, *, resume: bool = False, tensorboard: bool = False
) -> Result:
    """Train in the folder `task.out`; every rank calls this.

    Args:
        resume: continue the run there.
        tensorboard: also write TensorBoard files, to train/tensorboard.

    Raises:
        ValueError: the loss is not finite, or another process trains there.
        FileNotFoundError: the result of the run to resume is missing.
        OSError: the disk is full. Files saved earlier are intact.
    """
    with lock_run(task.out) if ranks.rank == 0 else nullcontext():
        trainer = Trainer(task, ranks)
        if resume:
            trainer.resume()
        board = task.out / "train" / "tensorboard" if tensorboard else None
        report = Report(task.out, trainer.result.step, board) if ranks.rank == 0 else None
        try:
            return trainer.run(report)
        finally:
            if report is not None:
                report.close()


class Trainer:
    """An objective, its optimizer, and the number of updates made."""

    def __init__(self, task: Task, ranks: DataParallel):
        self.task, self.settings, self.ranks = task, task.settings, ranks
        self.autocast: AbstractContextManager[Any] = nullcontext()
        if compute_dtype(task.settings.dtype, ranks.device) == torch.bfloat16:
            self.autocast = torch.autocast(ranks.device.type, torch.bfloat16)
        self.objective = task.objective(ranks)
        self.objective.train()
        self.wrapped = ranks.wrap(self.objective)
        self.optimizer = make_optimizer(task.parameter_groups(self.objective), task.settings)
        self.result = Result()
        self.state_path = task.out / "train" / "last.pt"

    def resume(self) -> None:
        """Load the last saved state, if there is one."""
        if not self.state_path.exists():
            return
        state = load_state(self.state_path, self.objective)
        set_state(self.objective, self.optimizer, state)
        self.result = read_result(self.state_path, state["result"])
        if self.result.best_step and not self.task.result_file.exists():
            raise FileNotFoundError(
                f"{self.task.result_file}, the model of step {self.result.best_step}, is missing; "
                "restore it, or start a new run in another folder"
            )

    def run(self, report: Report | None) -> Result:
        """Make the remaining updates, or stop at a signal. `report` is None except on rank 0."""
        steps, result = self.task.steps, self.result
        line: dict[str, Any] = {}

        def note() -> str:
            return f"loss {line['train_loss']:.3f}, {line['tokens_per_s']:,.0f} tok/s"

        with DeferredSignals() as signals:
            if self.task.evaluates_first and result.step == 0:
                self.evaluate_first(report)
            numbers: Iterable[int] = range(result.step, steps)
            if report is not None:  # one progress bar, not one per rank
                numbers = progress(numbers, "training", steps - result.step, "step", note)
            for step in numbers:
                line, result.signal = self.step(step, signals)
                due = result.step == steps or result.step % self.settings.eval_every == 0
                if due:
                    line |= self.evaluate()
                if report is not None:
                    report.write(line)
                if due or result.signal:
                    self.save(line, due)
                if due and report is not None:
                    report.draw()
                if result.signal:
                    break
        return result

    def evaluate_first(self, report: Report | None) -> None:
        """Report the loss and a sample before the first update."""
        line = {"step": 0} | self.evaluate()
        weights = gather_weights(self.objective, keep=report is not None)
        if report is not None:
            report.write(line)
            self.tell(line, weights, "")

    def step(self, step: int, signals: DeferredSignals) -> tuple[dict[str, Any], int | None]:
        """Make one update; return its metrics, and a signal that any rank received."""
        started, settings, ranks = time.perf_counter(), self.settings, self.ranks
        lr = settings.scheduled_lr(step, self.task.steps)
        set_learning_rate(self.optimizer, lr)
        batches = self.task.batches(step, ranks.rank, ranks.size)
        targets = self.task.target_count(step, ranks.size)
        if targets is None:
            [total] = ranks.sum_over_ranks(sum(map(self.objective.count, batches)))
            targets = int(total)
        nats = self.backward(step, batches, targets)
        limit = settings.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        own = sum(batch.tokens.numel() for batch in batches)
        nats, signalled, tokens = ranks.sum_over_ranks(nats, bool(signals.number), own)
        loss = nats / targets
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.fail(step + 1, f"the loss is {loss} and the norm of its gradient {float(norm)}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.result.step = step + 1
        speed = tokens / (time.perf_counter() - started)
        line = {"step": step + 1, "train_loss": loss, "lr": lr, "tokens_per_s": round(speed, 1)}
        return line, (signals.number or signal.SIGTERM) if signalled else None

    def backward(self, step: int, batches: list[Batch], targets: int) -> float:
        """Gradients of the mean over all `targets` of an update; return this rank's nats."""
        ranks, nats = self.ranks, []
        for i, batch in enumerate(batches):
            self.objective.begin(step, ranks.rank * len(batches) + i)
            ranks.set_gradient_sync(self.wrapped, enabled=i == len(batches) - 1)
            with self.autocast:
                loss = self.wrapped(*self.on_device(batch))
            (loss * (ranks.size / targets)).backward()  # gradients are averaged over the ranks
            nats.append(loss.detach())
        return sum(float(part) for part in nats)

    def on_device(self, batch: Batch) -> Batch:
        """A batch where the model is."""
        device = self.ranks.device
        return batch._replace(tokens=batch.tokens.to(device), targets=batch.targets.to(device))

    def evaluate(self) -> dict[str, float]:
        """{"val_loss": nats per target of the validation batches, over all ranks}, or nothing."""
        batches, ranks = self.task.validation(), self.ranks
        if batches is None:
            return {}
        nats, count = 0.0, 0.0
        self.objective.eval()
        with torch.no_grad():
            while group := list(islice(batches, ranks.size)):
                has_batch = ranks.rank < len(group)  # if not, compute one anyway: FSDP needs all
                batch = group[ranks.rank if has_batch else 0]
                with self.autocast:
                    part = float(self.objective(*self.on_device(batch)))
                if has_batch:
                    nats, count = nats + part, count + self.objective.count(batch)
        self.objective.train()
        ranks.reshard(self.objective)
        nats, total = ranks.sum_over_ranks(nats, count)
        loss = nats / total
        if not math.isfinite(loss):
            self.fail(self.result.step, f"the validation loss is {loss}")
        return {"val_loss": loss}

    def save(self, line: dict[str, Any], evaluated: bool) -> None:
        """Save the training state and, if this step was `evaluated` and is the best, the model."""
        result = self.result
        loss = line.get("val_loss", line["train_loss"])
        state = gather_state(self.objective, self.optimizer, keep=self.ranks.rank == 0)
        best = evaluated and (loss < result.best_loss or "val_loss" not in line)
        if best:
            result.best_step, result.best_loss = result.step, loss
        if self.ranks.rank > 0:
            return
        weights = {name.removeprefix("model."): w for name, w in state["weights"].items()}
        if best:
            self.task.save_best(weights)
        save_state(self.state_path, state | {"result": asdict(replace(result, signal=None))})
        if evaluated:
            self.tell(line, weights, " (the lowest)" if best else "")

    def tell(self, line: dict[str, Any], weights: dict[str, Tensor], remark: str) -> None:
        """Print the losses of an evaluation and a sample."""
        losses = [f"{name} loss {line[key]:.4f}" for name, key in LOSSES.items() if key in line]
        if "val_loss" in line:
            losses[-1] += remark
        text = textwrap.indent(self.task.sample(weights), "    ")
        text = f"\n{text}\n" if text else ""
        say(f"step {line['step']}: {', '.join(losses)}{text}")

    def fail(self, step: int, what: str) -> NoReturn:
        """Raise a ValueError: training has diverged."""
        best, out = self.result.best_step, self.task.out
        kept = f"{out} keeps the model of step {best}" if best else "no model was saved yet"
        advice = "Try a lower --lr, in another folder" if step else "Check the base: llama3 verify"
        raise ValueError(f"{what} at step {step}; {kept}. {advice}")
