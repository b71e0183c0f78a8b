"""The training loop: batches in, a checkpoint out. Knows nothing about the command line.

Shapes: B rows, T context, V vocabulary.
"""

from __future__ import annotations

import math
import signal
import textwrap
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llama.common.meta_device import without_memory
from llama.common.progress import progress, say
from llama.distributed.device import pick_device, pick_dtype
from llama.engine.forks import check_not_forked
from llama.generation import Llama
from llama.layers.optimize import optimize
from llama.model import Transformer
from llama.tokenizer import Tokenizer
from llama.train.data import Split
from llama.train.data_parallel import DataParallel
from llama.train.objective import Objective, prepare_model
from llama.train.optimizer import initialize, make_optimizer
from llama.train.report import Report, check_tensorboard
from llama.train.settings import Settings
from llama.train.signals import DeferredSignals
from llama.train.state import (
    create_run,
    gather_state,
    load_state,
    lock_run,
    open_run,
    sample_prompt,
    save_checkpoint,
    save_state,
    set_state,
)

SAMPLE_LENGTH = 200  # tokens of a sample, if max_seq_len has room for them
SAMPLE_TEMPERATURE = 0.8


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


def train(
    data: str | Path,
    out: str | Path,
    settings: Settings,
    *,
    resume: bool = False,
    tensorboard: bool = False,
    device: str | torch.device | None = None,
) -> Result:
    """Train a model on the text in `data` and write it to the folder `out`, as a checkpoint.

    Ctrl-C and SIGTERM stop the run after the current step and save it; `resume` continues it with
    the same losses as an uninterrupted run.

    Args:
        data: a text file, or a folder of .txt and .md files.
        resume: continue the run in `out`, with the same settings and data.
        tensorboard: also write TensorBoard files, to `out`/train/tensorboard.
        device: None means cuda, else mps, else cpu.

    Raises:
        ValueError: the loss is not finite; or see `create_run`, `open_run` and `lock_run`.
        FileExistsError, FileNotFoundError, ImportError: see the same functions.
        OSError: the disk is full. Files saved earlier are intact.
    """
    out = Path(out)
    if tensorboard:
        check_tensorboard()
    ranks = DataParallel.initialize(settings.parallel, pick_device(device))
    check_not_forked(ranks.device)
    if ranks.rank == 0 and not resume:
        create_run(data, out, settings, ranks.size)
    ranks.barrier()
    splits = open_run(data, out, settings, ranks.size)
    with lock_run(out) if ranks.rank == 0 else nullcontext():
        trainer = Trainer(settings, splits, out, ranks)
        if resume:
            trainer.resume()
        board = out / "train" / "tensorboard" if tensorboard else None
        report = Report(out, trainer.result.step, board) if ranks.rank == 0 else None
        try:
            return trainer.run(report)
        finally:
            if report is not None:
                report.close()


class Trainer:
    """A model, its optimizer, and the number of updates made."""

    def __init__(
        self, settings: Settings, splits: Mapping[str, Split], out: Path, ranks: DataParallel
    ):
        self.settings, self.splits, self.out, self.ranks = settings, splits, out, ranks
        self.tokenizer = Tokenizer(out / "tokenizer.model")
        self.prompt = sample_prompt(settings, splits, self.tokenizer)
        self.args = settings.model_args(self.tokenizer.n_words)
        native = pick_dtype(None, ranks.device) == torch.bfloat16
        self.autocast: AbstractContextManager[Any] = nullcontext()
        if settings.dtype == "bfloat16" or (settings.dtype is None and native):
            self.autocast = torch.autocast(ranks.device.type, torch.bfloat16)
        with without_memory():
            model = Transformer(self.args)
        prepare_model(model, settings.recompute)
        self.objective = Objective(model)
        ranks.shard(self.objective, list(model.layers))
        model.to_empty(device=ranks.device)
        initialize(model, settings.seed)
        self.wrapped = ranks.wrap(self.objective)
        self.optimizer = make_optimizer(self.objective, settings)
        self.result = Result()
        self.state_path = out / "train" / "last.pt"

    def resume(self) -> None:
        """Load the last saved state, if there is one."""
        if self.state_path.exists():
            state = load_state(self.state_path, self.objective)
            set_state(self.objective, self.optimizer, state)
            self.result = read_result(self.state_path, state["result"])
            model = self.out / "consolidated.00.pth"
            if self.result.best_step and not model.exists():
                raise FileNotFoundError(
                    f"{model}, the model of step {self.result.best_step}, is missing; restore it, "
                    "or start a new run in another folder"
                )

    def run(self, report: Report | None) -> Result:
        """Make the remaining updates, or stop at a signal. `report` is None except on rank 0."""
        settings, result = self.settings, self.result
        line: dict[str, Any] = {}

        def note() -> str:
            return f"loss {line['train_loss']:.3f}, {line['tokens_per_s']:,.0f} tok/s"

        steps: Iterable[int] = range(result.step, settings.steps)
        if report is not None:  # one progress bar, not one per rank
            steps = progress(steps, "training", settings.steps - result.step, "step", note)
        with DeferredSignals() as signals:
            for step in steps:
                line, result.signal = self.step(step, signals)
                due = result.step == settings.steps or result.step % settings.eval_every == 0
                if due and "validation" in self.splits:
                    line["val_loss"] = loss = self.validation_loss()
                    if not math.isfinite(loss):
                        self.fail(result.step, f"the validation loss is {loss}")
                if report is not None:
                    report.write(line)
                if due or result.signal:
                    self.save(line, due)
                if due and report is not None:
                    report.draw()
                if result.signal:
                    break
        return result

    def step(self, step: int, signals: DeferredSignals) -> tuple[dict[str, Any], int | None]:
        """Make one update; return its metrics, and a signal that any rank received."""
        started, settings = time.perf_counter(), self.settings
        lr = settings.lr_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.backward(step)
        limit = settings.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        loss, signalled = self.ranks.sum_over_ranks(loss / self.ranks.size, bool(signals.number))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.fail(step + 1, f"the loss is {loss} and the norm of its gradient {float(norm)}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.result.step = step + 1
        tokens = settings.batch_size * settings.max_seq_len * settings.accumulate * self.ranks.size
        speed = tokens / (time.perf_counter() - started)
        line = {"step": step + 1, "train_loss": loss, "lr": lr, "tokens_per_s": round(speed, 1)}
        return line, (signals.number or signal.SIGTERM) if signalled else None

    def backward(self, step: int) -> float:
        """Gradients of one update, over its `accumulate` batches; return this rank's loss."""
        s, ranks, loss = self.settings, self.ranks, 0.0
        for i in range(s.accumulate):
            # All parts together are one batch, whatever the number of ranks and of accumulations.
            part, parts = ranks.rank * s.accumulate + i, ranks.size * s.accumulate
            batch = self.splits["train"].batch(
                step, s.batch_size, s.max_seq_len, seed=s.seed, part=part, parts=parts
            )
            x, y = (ids.to(ranks.device) for ids in batch)
            ranks.set_gradient_sync(self.wrapped, enabled=i == s.accumulate - 1)
            with self.autocast:
                part_loss = self.wrapped(x, y) / s.accumulate
            part_loss.backward()
            loss += float(part_loss.detach())
        return loss

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean cross-entropy in nats over the windows of the validation split, on all ranks."""
        s, ranks, split = self.settings, self.ranks, self.splits["validation"]
        batches = split.windows(s.max_seq_len, s.batch_size, s.eval_windows)
        nats, count = 0.0, 0
        while group := list(islice(batches, ranks.size)):
            has_batch = ranks.rank < len(group)  # if not, compute one anyway: FSDP needs all ranks
            x, y = (ids.to(ranks.device) for ids in group[ranks.rank if has_batch else 0])
            with self.autocast:
                loss = float(self.objective(x, y))
            if has_batch:
                nats, count = nats + loss * y.numel(), count + y.numel()
        nats, total = ranks.sum_over_ranks(nats, count)
        return nats / total

    def save(self, line: dict[str, Any], evaluated: bool) -> None:
        """Save the training state and, if this step was `evaluated` and is the best, the model."""
        result = self.result
        loss = line.get("val_loss", line["train_loss"])
        state = gather_state(self.objective, self.optimizer)
        best = evaluated and (loss < result.best_loss or "validation" not in self.splits)
        if best:
            result.best_step, result.best_loss = result.step, loss
        if self.ranks.rank > 0:
            return
        weights = {name.removeprefix("model."): w for name, w in state["weights"].items()}
        if best:
            save_checkpoint(self.out, self.args, weights)
        save_state(self.state_path, state | {"result": asdict(replace(result, signal=None))})
        if evaluated:
            losses = f"step {result.step}: training loss {line['train_loss']:.4f}"
            if "val_loss" in line:
                losses += f", validation loss {loss:.4f}{' (the lowest)' if best else ''}"
            say(f"{losses}\n{textwrap.indent(self.sample(weights), '    ')}\n")

    def fail(self, step: int, what: str) -> NoReturn:
        """Raise a ValueError: training has diverged."""
        best = self.result.best_step
        kept = f"{self.out} keeps the model of step {best}" if best else "no model was saved yet"
        raise ValueError(f"{what} at step {step}; {kept}. Try a lower --lr, in another folder")

    def sample(self, weights: dict[str, Tensor]) -> str:
        """A continuation of the prompt, generated by `Llama` on the CPU."""
        with without_memory():
            model = Transformer(self.args)
        model.load_state_dict(weights, assign=True)
        optimize(model, exact=True)
        llama = Llama(model.eval(), self.tokenizer)
        room = min(SAMPLE_LENGTH, self.args.max_seq_len - len(self.prompt))
        tokens, _ = llama.generate(
            [self.prompt], room, SAMPLE_TEMPERATURE, echo=True, seed=self.settings.seed
        )
        return self.tokenizer.decode([i for i in tokens[0] if i != self.tokenizer.bos_id])
