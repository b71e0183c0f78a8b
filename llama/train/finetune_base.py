"""The checkpoint that is fine-tuned, and the folder of a run with its result. Knows no loop."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from llama.checkpoints.adapter import Vocabulary, write_adapter
from llama.checkpoints.convert import default_dtype
from llama.checkpoints.formats.peft import WEIGHTS_FILE
from llama.checkpoints.locate import expand
from llama.checkpoints.open import find_vocabulary, open_checkpoint, open_tokenizer, with_chat
from llama.checkpoints.source import Source, released_context
from llama.common.files import check_free_space, new_folder, replacing_file, write_json
from llama.distributed.sharding import weight_shapes
from llama.layers.lora import LoRAConfig
from llama.text.rank_file import read_sidecar
from llama.tokenizer import Tokenizer
from llama.train.data_parallel import DataParallel
from llama.train.finetune_settings import FinetuneSettings
from llama.train.state import check_resumable, record_settings, save_state

CHECKPOINT_FILE = "consolidated.00.pth"


@dataclass(frozen=True)
class Base:
    """An open checkpoint with its tokenizer.

    Attributes:
        vocabulary: what the tokenizer was made of: a rank file and a sidecar.
        brought: the tokenizer is not the checkpoint's own.
    """

    source: Source
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    brought: bool

    def digest(self) -> str:
        """A hash of the weights (a few of each) and the tokenizer."""
        found = {**self.source.fingerprints(), "tokenizer": self.vocabulary[1]}
        text = json.dumps(found, sort_keys=True).encode()
        return hashlib.sha256(text + self.vocabulary[0]).hexdigest()[:16]


def open_base(ckpt_dir: str | Path, tokenizer_path: str | Path | None = None) -> Base:
    """Open a checkpoint of any layout and its tokenizer.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `open_checkpoint` and `open_tokenizer`.
    """
    source = open_checkpoint(ckpt_dir)
    tokenizer = open_tokenizer(source, tokenizer_path)
    if tokenizer_path is None:
        vocabulary = find_vocabulary(source)
        assert vocabulary is not None, "open_tokenizer found it"
    else:
        path = expand(tokenizer_path)
        data = path.read_bytes()
        vocabulary = data, with_chat(source, data, read_sidecar(str(path)))
    return Base(source, tokenizer, vocabulary, tokenizer_path is not None)


def open_run(
    out: Path, settings: FinetuneSettings, ranks: DataParallel, inputs: str, *, resume: bool
) -> None:
    """Make the folder of a run, or check that the one there can be resumed.

    Args:
        inputs: a digest of the data, the base and its tokenizer.

    Raises:
        FileExistsError, FileNotFoundError, ValueError: see `new_folder` and `check_resumable`.
    """
    if ranks.rank == 0 and not resume:
        with new_folder(out) as folder:
            record_settings(folder, settings, ranks.size, inputs)
    ranks.barrier()
    if check_resumable(out, settings, ranks.size) != inputs:
        raise ValueError(
            f"the run in {out} cannot be resumed: the data, the base or its tokenizer has changed"
        )


def save_adapter(out: Path, base: Base, config: LoRAConfig, weights: Mapping[str, Tensor]) -> None:
    """Write an adapter into the folder of a run, or replace the one there.

    The weights' file comes last, in one step. The other files are the same at each call.

    Args:
        weights: A, B, magnitudes, and the embedding and the output if they were trained.

    Raises:
        OSError: the disk is full. The adapter that was there is intact.
    """
    whole = {name: w for name, w in weights.items() if name.endswith(".weight")}
    if base.source.tied and whole:
        whole.setdefault("output.weight", whole["tok_embeddings.weight"])
    low_rank = {name: w for name, w in weights.items() if name not in whole}
    vocabulary = base.vocabulary if whole or base.brought else None
    folder = out / "train" / ".adapter"
    shutil.rmtree(folder, ignore_errors=True)  # a killed process may have left it
    folder.mkdir()
    try:
        write_adapter(folder, base.source, config, low_rank, whole=whole, vocabulary=vocabulary)
        for file in sorted(folder.iterdir(), key=lambda path: path.name == WEIGHTS_FILE):
            with open(file, "rb") as f:
                os.fsync(f.fileno())
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_checkpoint(out: Path, base: Base, weights: Mapping[str, Tensor]) -> None:
    """Write a checkpoint in Meta's layout into the folder of a run, or replace the one there.

    Args:
        weights: those that were trained; the others are read from the base. The dtypes are the
            base's.

    Raises:
        OSError: the disk is full. The checkpoint that was there is intact.
    """
    source = base.source
    state: dict[str, Tensor] = {}
    for name in weight_shapes(source.args()):
        if name == "output.weight" and source.tied:
            state[name] = state["tok_embeddings.weight"]
            continue
        dtype = default_dtype(source) or source.dtype(name)
        w = weights[name] if name in weights else source.read(name)
        w = w.to("cpu", dtype)
        is_view = w.untyped_storage().nbytes() > w.nbytes  # of which torch.save writes all
        state[name] = w.clone() if is_view else w
    distinct = {w.data_ptr(): w.nbytes for w in state.values()}
    check_free_space(out, sum(distinct.values()))
    params = source.params
    if source.context != released_context(params):  # Meta's files do not say it
        params = params | {"max_seq_len": source.context}
    rank_file, sidecar = base.vocabulary
    with replacing_file(out / "tokenizer.model") as partial:
        partial.write_bytes(rank_file)
    for name, content in (("tokenizer.model.json", sidecar), ("params.json", params)):
        if content:
            with replacing_file(out / name) as partial:
                write_json(partial, content)
    save_state(out / CHECKPOINT_FILE, state)
