"""Which layout a path holds: told by its content, opened as a `Source`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama.checkpoints.formats.meta import QUANTIZATION, MetaShards, read_params
from llama.checkpoints.formats.quantized import QuantizedShard
from llama.checkpoints.source import Source
from llama.text.rank_file import read_sidecar
from llama.tokenizer import Tokenizer


def open_checkpoint(path: str | Path) -> Source:
    """Open a folder in Meta's or Hugging Face's layout, a GGUF file, or a folder with one GGUF.

    Raises:
        FileNotFoundError: nothing there, or nothing that is a checkpoint.
        ValueError: it is one, and damaged or of another architecture.
        ImportError: the extra that reads this layout is not installed.
    """
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as f:
            magic = f.read(4)
        if magic == b"GGUF":
            from llama.checkpoints.formats.gguf import GGUFSource

            return GGUFSource(path)
        raise ValueError(
            f"{path} is a file that is not a GGUF; give the folder that holds params.json or "
            "config.json"
        )
    if path.is_dir() and not (path / "params.json").is_file():
        if (path / "config.json").is_file():
            from llama.checkpoints.formats.hf import HFSource

            return HFSource(path)
        ggufs = list(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return open_checkpoint(ggufs[0])
        if (path / "original" / "params.json").is_file():
            return open_checkpoint(path / "original")
    return (QuantizedShard if QUANTIZATION in read_params(path) else MetaShards)(path)


def vocabulary_of(source: Source) -> tuple[bytes, dict[str, Any]] | None:
    """(tokenizer.model, its sidecar or {}) that belong to an open checkpoint, if it has any."""
    from llama.checkpoints.formats.hf_vocabulary import is_rank_file

    folder = source.path if source.path.is_dir() else source.path.parent
    for path in (folder / "tokenizer.model", folder / "original" / "tokenizer.model"):
        if source.path.is_dir() and path.is_file():
            if source.layout == "hf" and not is_rank_file(path):  # SentencePiece's have this name
                continue
            return path.read_bytes(), read_sidecar(str(path))
    return source.vocabulary()


def open_tokenizer(source: Source, tokenizer_path: str | Path | None = None) -> Tokenizer:
    """The tokenizer at `tokenizer_path`, or the one that came with the checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it does not fit the model's vocabulary, or cannot be read.
    """
    version = "llama3.1" if source.params.get("use_scaled_rope") else "llama3"  # the 3.1 releases
    if tokenizer_path is not None:
        tokenizer = Tokenizer(tokenizer_path, version)
    else:
        vocabulary = vocabulary_of(source)
        if vocabulary is None:
            raise FileNotFoundError(
                f"{source.path} has no tokenizer; give the path of its tokenizer.model"
            )
        tokenizer = Tokenizer.from_vocabulary(*vocabulary, str(source.path), version)
    size = source.params["vocab_size"]
    if tokenizer.n_words != size:
        raise ValueError(
            f"{tokenizer_path or source.path} has {tokenizer.n_words} tokens and the model {size}; "
            "give the tokenizer.model that came with the checkpoint (and beside it its "
            "tokenizer.model.json, if it came with one)"
        )
    return tokenizer
