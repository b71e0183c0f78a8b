"""The training loop: batches in, a checkpoint out. Knows no command line.

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
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from llama.common.progress import progress, say
from llama.distributed.device import pick_device, pick_dtype
from llama.generation import Llama
from llama.model import Transformer, TransformerBlock
from llama.tokenizer import Tokenizer
from llama.train.data import Split
from llama.train.optimizer import initialize, make_optimizer
from llama.train.ranks import Ranks
from llama.train.report import Report, check_tensorboard
from llama.train.settings import Settings
from llama.train.signals import Stop
from llama.train.state import (
    alone,
    gather,
    load_state,
    open_data,
    prepare,
    sample_prompt,
    save,
    save_model,
    scatter,
)

SAMPLE = 200  # ids, if the context has room for them
TEMPERATURE = 0.8


class Objective(nn.Module):
    """What is minimised: the mean cross-entropy of each next id, in nats."""

    def __init__(self, model: Transformer, recompute: bool):
        super().__init__()
        self.model = model
        # A layer's activations are computed again in the backward pass instead of kept.
        kept = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        self.block = kept if recompute else TransformerBlock.__call__

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, T) ids and those that follow them -> a scalar."""
        logits = self.model.logits(self.model.hidden(x, block=self.block))  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


@dataclass
class Result:
    """How a run ended.

    Attributes:
        step: updates made, of those that were asked for.
        best_step, best_loss: of the checkpoint that was kept; without a validation split the loss
            is that of training, and the newest is kept.
        signal: what stopped it before its end.
    """

    step: int = 0
    best_step: int = 0
    best_loss: float = math.inf
    signal: int | None = None


def train(
    data: str | Path,
    out: str | Path,
    settings: Settings,
    *,
    resume: bool = False,
    tensorboard: bool = False,
    device: str | torch.device | None = None,
) -> Result:
    """Train a model on the text in `data`; the folder `out` becomes a checkpoint of it.

    Ctrl-C, and SIGTERM, end it after a step, and save; `resume` goes on as if nothing had been.

    Args:
        data: a text file, or a folder of them.
        resume: go on with the run in `out`, with the same settings and data.
        tensorboard: also write for TensorBoard, into `out`/train/tensorboard.
        device: None picks cuda, then mps, then cpu.

    Raises:
        ValueError: the loss is no number (any more), or see `prepare`, `open_data` and `alone`.
        FileExistsError, FileNotFoundError, ImportError: as these.
        OSError: the disk is full. What was saved before is whole.
    """
    out = Path(out)
    if tensorboard:
        check_tensorboard()
    place = pick_device(device)
    ranks = Ranks.join(settings.parallel, place)
    if ranks.rank == 0 and not resume:
        prepare(data, out, settings, ranks.size)
    ranks.wait()
    splits = open_data(data, out, settings, ranks.size)
    with alone(out) if ranks.rank == 0 else nullcontext():
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
    """A model, its optimizer, and the steps that it has taken."""

    def __init__(self, settings: Settings, splits: Mapping[str, Split], out: Path, ranks: Ranks):
        self.settings, self.splits, self.out, self.ranks = settings, splits, out, ranks
        self.tokenizer = Tokenizer(out / "tokenizer.model")
        self.prompt = sample_prompt(settings, splits, self.tokenizer)
        self.args = settings.model_args(self.tokenizer.n_words)
        native = pick_dtype(None, ranks.device) == torch.bfloat16
        self.autocast: AbstractContextManager[Any] = nullcontext()
        if settings.dtype == "bfloat16" or (settings.dtype is None and native):
            self.autocast = torch.autocast(ranks.device.type, torch.bfloat16)
        with torch.device("meta"):
            model = Transformer(self.args)
        self.objective = Objective(model, settings.recompute)
        ranks.shard(self.objective, list(model.layers))
        model.to_empty(device=ranks.device)
        initialize(model, settings.seed)
        self.wrapped = ranks.wrap(self.objective)
        self.optimizer = make_optimizer(self.objective, settings)
        self.result = Result()
        self.state_path = out / "train" / "last.pt"

    def resume(self) -> None:
        """Go back to what was saved last, if anything was."""
        if self.state_path.exists():
            state = load_state(self.state_path)
            scatter(self.objective, self.optimizer, state)
            self.result = Result(**state["result"])
            model = self.out / "consolidated.00.pth"
            if self.result.best_step and not model.exists():
                raise FileNotFoundError(
                    f"{model}, the model of step {self.result.best_step}, is gone; put it back, or "
                    "start the run anew in another folder"
                )

    def run(self, report: Report | None) -> Result:
        """All steps that are left, or until a signal comes. Only the first rank has a report."""
        settings, result = self.settings, self.result
        line: dict[str, Any] = {}

        def note() -> str:
            return f"loss {line['train_loss']:.3f}, {line['tokens_per_s']:,.0f} tok/s"

        steps: Iterable[int] = range(result.step, settings.steps)
        if report is not None:  # the other ranks' bars would be too many
            steps = progress(steps, "training", settings.steps - result.step, "step", note)
        with Stop() as stop:
            for step in steps:
                line, result.signal = self.step(step, stop)
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

    def step(self, step: int, stop: Stop) -> tuple[dict[str, Any], int | None]:
        """One update: its line of the metrics, and the signal that came to any rank."""
        started, settings = time.perf_counter(), self.settings
        lr = settings.lr_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = self.backward(step)
        limit = settings.grad_clip or math.inf
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), limit)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        loss, signalled = self.ranks.total(loss / self.ranks.size, bool(stop.signal))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.fail(step + 1, f"the loss is {loss} and the norm of its gradient {float(norm)}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.result.step = step + 1
        tokens = settings.batch_size * settings.max_seq_len * settings.accumulate * self.ranks.size
        speed = tokens / (time.perf_counter() - started)
        line = {"step": step + 1, "train_loss": loss, "lr": lr, "tokens_per_s": round(speed, 1)}
        return line, (stop.signal or signal.SIGTERM) if signalled else None

    def backward(self, step: int) -> float:
        """Gradients of an update's batches, `accumulate` of them; this rank's loss."""
        s, ranks, loss = self.settings, self.ranks, 0.0
        for i in range(s.accumulate):
            # Rows as of one large batch, so that neither ranks nor accumulating change them.
            part, parts = ranks.rank * s.accumulate + i, ranks.size * s.accumulate
            batch = self.splits["train"].batch(
                step, s.batch_size, s.max_seq_len, s.seed, part, parts
            )
            x, y = (ids.to(ranks.device) for ids in batch)
            ranks.average_gradients(self.wrapped, i == s.accumulate - 1)
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
            mine = ranks.rank < len(group)  # others compute too: under FSDP all have to
            x, y = (ids.to(ranks.device) for ids in group[ranks.rank if mine else 0])
            with self.autocast:
                loss = float(self.objective(x, y))
            if mine:
                nats, count = nats + loss * y.numel(), count + y.numel()
        nats, total = ranks.total(nats, count)
        return nats / total

    def save(self, line: dict[str, Any], evaluated: bool) -> None:
        """The training state; and where it was `evaluated` and is the best, the checkpoint."""
        result = self.result
        loss = line.get("val_loss", line["train_loss"])
        state = gather(self.objective, self.optimizer)
        best = evaluated and (loss < result.best_loss or "validation" not in self.splits)
        if best:
            result.best_step, result.best_loss = result.step, loss
        if self.ranks.rank > 0:
            return
        weights = {name.removeprefix("model."): w for name, w in state["weights"].items()}
        if best:
            save_model(self.out, self.args, weights)
        save(self.state_path, state | {"result": asdict(replace(result, signal=None))})
        if evaluated:
            losses = f"step {result.step}: training loss {line['train_loss']:.4f}"
            if "val_loss" in line:
                losses += f", validation loss {loss:.4f}{' (the lowest)' if best else ''}"
            say(f"{losses}\n{textwrap.indent(self.sample(weights), '    ')}\n")

    def fail(self, step: int, what: str) -> NoReturn:
        """Stop at what cannot be mended by going on."""
        best = self.result.best_step
        kept = f"{self.out} keeps the model of step {best}" if best else "no model was saved yet"
        raise ValueError(f"{what} at step {step}; {kept}. Try a lower --lr, in another folder")

    def sample(self, weights: dict[str, Tensor]) -> str:
        """A text that the model continues, by the same code that serves it later."""
        with torch.device("meta"):
            model = Transformer(self.args)
        model.load_state_dict(weights, assign=True)
        model.eval().setup_cache(1, self.args.max_seq_len)
        llama = Llama(model, self.tokenizer)
        room = min(SAMPLE, self.args.max_seq_len - len(self.prompt))
        drawn, _ = llama.generate(
            [self.prompt], room, TEMPERATURE, echo=True, seed=self.settings.seed
        )
        return self.tokenizer.decode([i for i in drawn[0] if i != self.tokenizer.bos_id])
