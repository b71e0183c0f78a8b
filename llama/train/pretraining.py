"""Pre-training: text files -> a checkpoint in Meta's layout. Knows nothing about the command line.

OUT/                  the checkpoint with the lowest validation loss so far
  params.json, consolidated.00.pth, tokenizer.model, tokenizer.model.json
  train/
    0123456789abcdef/ the text as token ids
and the files of every run; see `state`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.common.files import new_folder, replacing_file
from llama.common.meta_device import without_memory
from llama.distributed.device import pick_device
from llama.engine.forks import check_not_forked
from llama.generation import Llama
from llama.layers.optimize import optimize
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer
from llama.train.batch import Batch
from llama.train.data import Corpus, Split
from llama.train.data_parallel import DataParallel
from llama.train.learn_tokenizer import learn
from llama.train.loop import Result, run_task
from llama.train.objective import Objective, prepare_model
from llama.train.optimizer import initialize, parameter_groups
from llama.train.report import check_tensorboard
from llama.train.settings import Settings
from llama.train.state import check_resumable, record_settings, refuse_existing, save_state

SAMPLE_LENGTH = 200  # tokens of a sample, if max_seq_len has room for them
SAMPLE_TEMPERATURE = 0.8
# Fields of ModelArgs that params.json omits: a limit of inference, and RoPE scaling, which is off.
NOT_SAVED = ("max_batch_size", "use_scaled_rope", "rope_scale_factor")


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
    task = Pretraining(settings, splits, out)
    return run_task(task, ranks, resume=resume, tensorboard=tensorboard)


class Pretraining:
    """A new model on windows of text: a `Task`."""

    evaluates_first = False

    def __init__(self, settings: Settings, splits: Mapping[str, Split], out: Path):
        self.settings, self.splits, self.out = settings, splits, out
        self.steps = settings.steps
        self.result_file = out / "consolidated.00.pth"
        self.tokenizer = Tokenizer(out / "tokenizer.model")
        self.prompt = sample_prompt(settings, splits, self.tokenizer)
        self.args = settings.model_args(self.tokenizer.n_words)

    def objective(self, ranks: DataParallel) -> Objective:
        """A model with initial weights."""
        with without_memory():
            model = Transformer(self.args)
        prepare_model(model, self.settings.recompute)
        objective = Objective(model)
        ranks.shard(objective, list(model.layers))
        model.to_empty(device=ranks.device)
        initialize(model, self.settings.seed)
        return objective

    def parameter_groups(self, objective: Objective) -> list[dict[str, Any]]:
        """All parameters."""
        return parameter_groups(objective, self.settings)

    def batches(self, step: int, rank: int, ranks: int) -> list[Batch]:
        """Random windows. All parts are one batch, whatever the number of ranks and of parts."""
        s = self.settings
        parts = range(rank * s.accumulate, (rank + 1) * s.accumulate)
        return [
            Batch(
                *self.splits["train"].batch(
                    step,
                    s.batch_size,
                    s.max_seq_len,
                    seed=s.seed,
                    part=i,
                    parts=ranks * s.accumulate,
                )
            )
            for i in parts
        ]

    def target_count(self, step: int, ranks: int) -> int:
        """Every token of every row."""
        s = self.settings
        return s.batch_size * s.max_seq_len * s.accumulate * ranks

    def validation(self) -> Iterator[Batch] | None:
        """Windows of the validation split, if there is one."""
        s = self.settings
        if "validation" not in self.splits:
            return None
        windows = self.splits["validation"].windows(s.max_seq_len, s.batch_size, s.eval_windows)
        return (Batch(x, y) for x, y in windows)

    def save_best(self, weights: dict[str, Tensor]) -> None:
        """Write the checkpoint."""
        save_checkpoint(self.out, self.args, weights)

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


def create_run(data: str | Path, out: Path, settings: Settings, ranks: int) -> None:
    """Create the folder of a new run, with tokenizer, token ids and settings, or nothing at all.

    Args:
        ranks: the number of processes that train.

    Raises:
        FileExistsError: `out` exists and is not an empty folder.
        ValueError, FileNotFoundError, ImportError: see `Corpus` and `learn`.
    """
    refuse_existing(out)
    corpus = Corpus(data, settings.val_fraction, settings.test_fraction)
    with new_folder(out) as folder:
        texts, training = corpus.texts(), corpus.texts("train")
        tokenizer = learn(settings.tokenizer, texts, training, folder)
        splits = corpus.tokenized(tokenizer, folder / "train")
        for split in splits.values():
            split.check(settings.max_seq_len)
        sample_prompt(settings, splits, Tokenizer(tokenizer))
        record_settings(folder, settings, ranks, corpus.key(tokenizer))


def sample_prompt(
    settings: Settings, splits: Mapping[str, Split], tokenizer: Tokenizer
) -> list[int]:
    """The token ids that samples continue: `settings.prompt`, or the first id of the text.

    Raises:
        ValueError: the tokenizer lacks a character of the prompt, or its length is out of range.
    """
    if settings.prompt is None:
        return [int(splits.get("validation", splits["train"]).ids[0])]
    ids = tokenizer.encode(settings.prompt, bos=True, eos=False)
    if not 0 < len(ids) < settings.max_seq_len:
        raise ValueError(
            f"the prompt has {len(ids)} tokens; it must have at least 1 and fewer than "
            f"max_seq_len {settings.max_seq_len}"
        )
    return ids


def open_run(data: str | Path, out: Path, settings: Settings, ranks: int) -> dict[str, Split]:
    """The splits of the run in `out`, after checking that it can continue with these arguments.

    Raises:
        FileNotFoundError: `out` contains no run.
        ValueError: settings, ranks, text or tokenizer differ; the message names all differences.
    """
    recorded = check_resumable(out, settings, ranks)
    corpus = Corpus(data, settings.val_fraction, settings.test_fraction)
    tokenizer = out / "tokenizer.model"
    if corpus.key(tokenizer) != recorded:
        raise ValueError(f"the run in {out} cannot be resumed: {data} or {tokenizer} has changed")
    return corpus.tokenized(tokenizer, out / "train")


def save_checkpoint(folder: Path, args: ModelArgs, weights: dict[str, Tensor]) -> None:
    """Write params.json and consolidated.00.pth beside the tokenizer, in Meta's layout."""
    params = {
        k: v for k, v in dataclasses.asdict(args).items() if k not in NOT_SAVED and v is not None
    }
    with replacing_file(folder / "params.json") as partial:
        partial.write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")
    save_state(folder / "consolidated.00.pth", {name: w.cpu() for name, w in weights.items()})
