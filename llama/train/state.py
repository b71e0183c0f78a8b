"""The files of a run: the model in the official layout, and what a run needs to go on.

DIR/                  a checkpoint: the model with the lowest validation loss so far
  params.json, consolidated.00.pth, tokenizer.model, tokenizer.model.json
  metrics.jsonl, loss.png
  train/              what resuming needs
    settings.json     the settings, and a digest of the text and the tokenizer
    last.pt           weights and optimizer after the last step that was saved
    0123456789abcdef/ the text as ids
"""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llama.args import ModelArgs
from llama.checkpoints.formats.meta import is_disk_error
from llama.common.files import new_folder
from llama.tokenizer import Tokenizer
from llama.train.data import Corpus, Split
from llama.train.learn_tokenizer import learn
from llama.train.report import replacing
from llama.train.settings import Settings

LEFT_OUT = ("max_batch_size", "use_scaled_rope", "rope_scale_factor")


def prepare(data: str | Path, out: Path, settings: Settings, ranks: int) -> None:
    """Make the folder of a new run: tokenizer, ids, settings; whole or not at all.

    Args:
        ranks: how many processes will train, each on batches of its own.

    Raises:
        FileExistsError: there is something in `out`.
        ValueError, FileNotFoundError, ImportError: see `Corpus` and `learn`.
    """
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if out.exists():
        run = (out / "train" / "settings.json").is_file()
        remedy = "--resume goes on with the run in it, or choose" if run else "choose"
        raise FileExistsError(f"{out} exists already; {remedy} another folder for --out")
    corpus = Corpus(data, settings.val_fraction, settings.test_fraction)
    with new_folder(out) as folder:
        texts, training = corpus.texts(), corpus.texts("train")
        tokenizer = learn(settings.tokenizer, texts, training, folder)
        splits = corpus.tokenized(tokenizer, folder / "train")
        for split in splits.values():
            split.check(settings.max_seq_len)
        sample_prompt(settings, splits, Tokenizer(tokenizer))
        given = dataclasses.asdict(settings) | {"ranks": ranks}
        known = {"settings": given, "data": corpus.key(tokenizer)}
        text = json.dumps(known, indent=2, ensure_ascii=False) + "\n"
        (folder / "train" / "settings.json").write_text(text, encoding="utf-8")


def sample_prompt(
    settings: Settings, splits: Mapping[str, Split], tokenizer: Tokenizer
) -> list[int]:
    """The ids that samples continue.

    Raises:
        ValueError: the prompt has a character that the tokenizer lacks, or is too long.
    """
    if settings.prompt is None:
        return [int(splits.get("validation", splits["train"]).ids[0])]
    ids = tokenizer.encode(settings.prompt, bos=True, eos=False)
    if not 0 < len(ids) < settings.max_seq_len:
        raise ValueError(
            f"the prompt has {len(ids)} tokens; it needs from 1 to below max_seq_len "
            f"{settings.max_seq_len}"
        )
    return ids


def open_data(data: str | Path, out: Path, settings: Settings, ranks: int) -> dict[str, Split]:
    """The splits of the run in `out`.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: other settings or other data; all differences are named.
    """
    path = out / "train" / "settings.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{out} holds no run to go on with; start one without --resume, in a new folder"
        )
    known = json.loads(path.read_text(encoding="utf-8"))
    differences = settings.differences(known["settings"], ranks)
    corpus = Corpus(data, settings.val_fraction, settings.test_fraction)
    tokenizer = out / "tokenizer.model"
    if not differences and corpus.key(tokenizer) != known["data"]:
        differences = [f"{data} or {tokenizer} is not what it was"]
    if differences:
        raise ValueError(f"the run in {out} cannot go on: {'; '.join(differences)}")
    return corpus.tokenized(tokenizer, out / "train")


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """A block in which no other process of this machine may train in `out`.

    Raises:
        ValueError: one does.
    """
    with open(out / "train" / "settings.json", encoding="utf-8") as f:
        try:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process trains in {out}; wait for it, or end it") from None
        except (ImportError, OSError):  # a system, or a file system, that has no locks
            pass
        yield


def save(path: Path, content: dict[str, Any]) -> None:
    """Replace `path` by a torch file of `content`, whole or not at all.

    Raises:
        OSError: the disk is full.
    """
    with replacing(path) as partial:
        try:
            torch.save(content, partial)
        except RuntimeError as e:  # torch's word for a write that failed
            raise OSError(f"{path} could not be written; is the disk full? ({e})") from e


def save_model(folder: Path, args: ModelArgs, weights: dict[str, Tensor]) -> None:
    """Write params.json and the one shard of the official layout; the tokenizer lies there."""
    params = {
        k: v for k, v in dataclasses.asdict(args).items() if k not in LEFT_OUT and v is not None
    }
    with replacing(folder / "params.json") as partial:
        partial.write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")
    save(folder / "consolidated.00.pth", {name: w.cpu() for name, w in weights.items()})


def load_state(path: Path) -> dict[str, Any]:
    """What `save` wrote; no code in it is run.

    Raises:
        ValueError: it is damaged.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as e:
        if is_disk_error(e):
            raise
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"{path} is damaged; start the run anew ({reason})") from None
    assert isinstance(state, dict)
    return state


def gather(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Whole weights and optimizer state by name, on the first rank; {} on others under FSDP."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    sharded = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(module, optimizer, options=sharded)
    return {"weights": weights, "optimizer": moments}


def scatter(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """The inverse of `gather`, from the same `state` on every rank."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    set_state_dict(
        module,
        optimizer,
        model_state_dict=state["weights"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
