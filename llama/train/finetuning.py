"""Fine-tuning: a checkpoint and samples -> an adapter, or a checkpoint. Knows no command line.

OUT/                  the result with the lowest validation loss so far
  adapter_config.json, adapter_model.safetensors, llama3_adapter.json (methods lora, dpo), or
  params.json, consolidated.00.pth, tokenizer.model, tokenizer.model.json (the others)
and the files of every run; see `state`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoints.formats.peft import WEIGHTS_FILE
from llama.common.progress import say
from llama.distributed.device import pick_device
from llama.distributed.sharding import VOCABULARY
from llama.engine.forks import check_not_forked
from llama.generation import Llama
from llama.layers.new_rows import NEW_ROWS, join_rows
from llama.layers.optimize import optimize
from llama.train.batch import Batch
from llama.train.data_parallel import DataParallel
from llama.train.finetune_base import (
    CHECKPOINT_FILE,
    Base,
    open_base,
    open_run,
    save_adapter,
    save_checkpoint,
)
from llama.train.finetune_data import Samples, load_samples
from llama.train.finetune_model import (
    check_base,
    make_objective,
    model_without_weights,
    trained_share,
)
from llama.train.finetune_settings import FinetuneSettings
from llama.train.loop import Result, run_task
from llama.train.objective import Objective, compute_dtype
from llama.train.optimizer import parameter_groups
from llama.train.report import check_tensorboard
from llama.train.show_rows import show
from llama.train.state import refuse_existing
from llama.train.untrained_tokens import untrained_warning

SAMPLE_LENGTH = 256  # most tokens of an answer that is printed
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")  # torch's messages on CPUs


def finetune(
    ckpt_dir: str | Path,
    data: Sequence[str | Path],
    out: str | Path,
    settings: FinetuneSettings,
    *,
    tokenizer_path: str | Path | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    device: str | torch.device | None = None,
) -> Result:
    """Train the checkpoint `ckpt_dir` further on the samples in `data`; write the result to `out`.

    Ctrl-C and SIGTERM stop the run after the current update and save it; `resume` continues it.

    Args:
        ckpt_dir: of any layout. Method lora takes a quantized one too.
        data: files; see `read_examples`.
        tokenizer_path: the checkpoint's `tokenizer.model`; None takes the one beside or in it.
        resume: continue the run in `out`, with the same settings, data and base.
        tensorboard: also write TensorBoard files, to `out`/train/tensorboard.
        device: None means cuda, else mps, else cpu.

    Raises:
        ValueError: the data, the base or the settings cannot be used, or the loss is not finite.
        FileExistsError, FileNotFoundError, ImportError: see `open_checkpoint`, `read_examples`,
            `refuse_existing` and `check_resumable`.
        MemoryError: the device has too little memory.
        OSError: the disk is full. Files saved earlier are intact.
    """
    out = Path(out)
    if tensorboard:
        check_tensorboard()
    ranks = DataParallel.initialize(settings.parallel, pick_device(device))
    check_not_forked(ranks.device)
    if ranks.rank == 0 and not resume:
        refuse_existing(out)
    base = open_base(ckpt_dir, tokenizer_path)
    check_base(base.source, settings)
    samples = base_samples(base, data, settings)
    task = Finetuning(settings, base, samples, out, ranks)
    summary = task.summary(ranks.size)
    open_run(out, settings, ranks, f"{samples.digest} {base.digest()}", resume=resume)
    if ranks.rank == 0:
        say(summary)
        warn_of_untrained_tokens(base, samples, settings)
    with advice_on_memory(ranks.device, task):
        return run_task(task, ranks, resume=resume, tensorboard=tensorboard)


def base_samples(base: Base, data: Sequence[str | Path], settings: FinetuneSettings) -> Samples:
    """The samples in `data` as rows for a base; see `load_samples`."""
    source = base.source
    rows = source.params["vocab_size"]
    return load_samples(data, settings, base.tokenizer, source.context, rows)


@contextmanager
def advice_on_memory(device: torch.device, task: Finetuning) -> Iterator[None]:
    """A block whose lack of memory becomes a MemoryError that says what to lower."""
    try:
        yield
    except RuntimeError as e:
        if not (isinstance(e, torch.OutOfMemoryError) or any(t in str(e) for t in OUT_OF_MEMORY)):
            raise
        raise MemoryError(f"{device} has too little memory; {task.remedy()}") from None


def warn_of_untrained_tokens(base: Base, samples: Samples, settings: FinetuneSettings) -> None:
    """Warn if the rows have tokens that the base does not know and that stay untrained."""
    if not settings.adapts or settings.train_embeddings:
        return
    source, names = base.source, ["tok_embeddings.weight", "output.weight"]
    stored = names[: 1 if source.tied or source.quantization else 2]
    weights = [source.read(name) for name in stored]
    if warning := untrained_warning(samples.train.rows, base.tokenizer, weights):
        warnings.warn(warning, stacklevel=3)


def show_rows(
    ckpt_dir: str | Path,
    data: Sequence[str | Path],
    settings: FinetuneSettings,
    count: int,
    *,
    tokenizer_path: str | Path | None = None,
    color: bool = False,
) -> str:
    """The summary of the samples, and the first `count` rows with what is trained marked.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `finetune`.
    """
    if count < 1:
        raise ValueError(f"show must be 1 or more rows, not {count}")
    base = open_base(ckpt_dir, tokenizer_path)
    samples = base_samples(base, data, settings)
    rows = show(samples.train.rows, base.tokenizer, count, color=color)
    return "\n".join([*samples.summary(), "", rows])


class Finetuning:
    """A checkpoint's model on samples: a `Task`."""

    evaluates_first = True

    def __init__(
        self,
        settings: FinetuneSettings,
        base: Base,
        samples: Samples,
        out: Path,
        ranks: DataParallel,
    ):
        self.settings, self.base, self.samples, self.out = settings, base, samples, out
        self.result_file = out / (WEIGHTS_FILE if settings.adapts else CHECKPOINT_FILE)
        per_epoch = samples.train.steps_per_epoch(ranks.size)
        self.steps = settings.steps or max(1, math.ceil(settings.epochs * per_epoch))
        longest = samples.max_seq_len
        self.args = base.source.args(max_seq_len=longest, max_batch_size=1)
        self.dtype = compute_dtype(settings.dtype, ranks.device)
        self.sharded = ranks.kind == "fsdp"
        self._objective: Objective | None = None
        self._prompts_shown = False

    def objective(self, ranks: DataParallel) -> Objective:
        """The base's model, with adapters if they are trained."""
        self._objective = make_objective(
            self.base.source, self.args, self.settings, ranks, dtype=self.dtype
        )
        return self._objective

    def parameter_groups(self, objective: Objective) -> list[dict[str, Any]]:
        """The trained parameters; LoRA+ (arXiv:2402.12354) gives B a learning rate of its own."""
        scales = {"lora_b": self.settings.lora_plus}
        scales |= dict.fromkeys((*VOCABULARY, NEW_ROWS), self.settings.embeddings_lr)
        return parameter_groups(objective, self.settings, scales)

    def batches(self, step: int, rank: int, ranks: int) -> list[Batch]:
        """Rows of an epoch; the longest are in the first update."""
        return self.samples.train.batches(step, rank, ranks)

    def target_count(self, step: int, ranks: int) -> int:
        """Trained ids of an update's rows."""
        return self.samples.train.target_count(step, ranks)

    def validation(self) -> Iterator[Batch] | None:
        """Held-out rows, if there are any."""
        rows = self.samples.validation
        return None if rows is None else rows.in_order(self.settings.eval_windows)

    def save_best(self, weights: dict[str, Tensor]) -> None:
        """Write the adapter or the checkpoint."""
        if first := self.settings.embeddings_from:
            read = self.base.source.read
            weights = join_rows(weights, {name: read(name, 0, 0, first) for name in VOCABULARY})
        if self.settings.adapts:
            save_adapter(self.out, self.base, self.settings.lora, weights)
        else:
            save_checkpoint(self.out, self.base, weights)

    @torch.no_grad()
    def sample(self, weights: dict[str, Tensor]) -> str:
        """Greedy answers to held-out prompts, by the model where it is; with FSDP none."""
        answers = self.samples.answers(self.settings.samples)
        if self.sharded or not answers:
            return ""
        llama, decode = self._llama(), self.base.tokenizer.decode
        texts = []
        for number, (prompt, reference) in enumerate(answers, 1):
            if not self._prompts_shown:
                texts += [f"prompt {number}: {decode(prompt)}", f"reference: {decode(reference)}"]
            room = max(1, min(SAMPLE_LENGTH, self.args.max_seq_len - len(prompt)))
            [ids], _ = llama.generate([prompt], room, 0.0)
            texts.append(f"answer {number}: {decode(ids)}{'' if len(ids) < room else ' ...'}")
        self._prompts_shown = True
        return "\n".join(texts)

    def _llama(self) -> Llama:
        """A `Llama` over the weights of the model in training, which are not copied."""
        assert self._objective is not None
        model = model_without_weights(self.base.source, self.args, self.settings)
        state = dict(self._objective.model.state_dict())
        if self.settings.method != "full":  # one dtype from the embedding to the output
            state |= {n: state[n].to(self.dtype) for n in VOCABULARY if n in state}
        model.load_state_dict(state, assign=True)
        optimize(
            model, exact=model.norm.weight.device.type != "cpu"
        )  # a GPU's modules copy weights
        return Llama(model.eval(), self.base.tokenizer)

    def summary(self, ranks: int) -> str:
        """What will be trained, on what, and for how long, in a few lines."""
        s = self.settings
        model = model_without_weights(self.base.source, self.args, s)
        trained, total = trained_share(model, s)
        per_epoch = self.samples.train.steps_per_epoch(ranks)
        rows = s.batch_size * s.accumulate * ranks
        whole = "embedding and output" + (
            f" from row {s.embeddings_from} on" if s.embeddings_from else ""
        )
        lora = f"LoRA of rank {s.rank} on {s.targets}" + f", {whole}" * s.train_embeddings
        what = {"full": "all weights", "embeddings": whole}
        return "\n".join(
            [
                *self.samples.summary(),
                f"trained: {trained:,} of {total:,} parameters ({trained / total:.2%}): "
                f"{what.get(s.method, lora)}",
                f"{self.steps} updates of up to {rows} rows ({self.steps / per_epoch:.2g} epochs), "
                f"learning rate {s.peak_lr:g}",
            ]
        )

    def remedy(self) -> str:
        """What needs less memory, for a message."""
        s, proposals = self.settings, []
        if s.batch_size > 1:
            half = s.batch_size // 2
            proposals.append(f"--batch_size {half} with --accumulate {s.accumulate * 2}")
        if not s.recompute:
            proposals.append("--recompute")
        proposals.append(f"--max_seq_len below {self.args.max_seq_len}")
        if s.adapts and s.quantize != "int4" and not self.base.source.quantization:
            proposals.append("--quantize int4")
        if s.method == "full":
            proposals.append("--method lora")
        return f"try {', '.join(proposals[:-1])} or {proposals[-1]}"
