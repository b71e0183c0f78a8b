"""A path -> an open checkpoint and its tokenizer. The layout is recognised by the content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama.checkpoints.download import hub_name
from llama.checkpoints.formats.meta import QUANTIZATION, MetaSource, read_params
from llama.checkpoints.formats.quantized import QuantizedSource
from llama.checkpoints.source import Source
from llama.text.rank_file import read_sidecar
from llama.tokenizer import Tokenizer


def open_checkpoint(path: str | Path) -> Source:
    """Open a folder in Meta's or Hugging Face's layout, a GGUF file, or a folder with one GGUF.

    Raises:
        FileNotFoundError: no such path, or no checkpoint in it.
        ValueError: the checkpoint is damaged or of another architecture.
        ImportError: the extra that reads this layout is not installed.
    """
    name, path = hub_name(str(path)), Path(path)
    if name is not None and not path.exists():
        raise FileNotFoundError(
            f"no checkpoint at {path}; if it is a repository of the Hugging Face hub, "
            f"`llama3 download {name}` fetches it and prints the folder to give instead"
        )
    if path.is_file():
        with open(path, "rb") as f:
            magic = f.read(4)
        if magic == b"GGUF":
            from llama.checkpoints.formats.gguf import GGUFSource

            return GGUFSource(path)
        raise ValueError(
            f"{path} is a file that is not a GGUF; give the folder that contains params.json or "
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
    return QuantizedSource(path) if QUANTIZATION in read_params(path) else MetaSource(path)


def find_vocabulary(source: Source) -> tuple[bytes, dict[str, Any]] | None:
    """(content of tokenizer.model, its sidecar or {}) of an open checkpoint; None: it has none."""
    from llama.checkpoints.formats.hf_tokenizer_import import is_rank_file

    folder = source.path if source.path.is_dir() else source.path.parent
    for path in (folder / "tokenizer.model", folder / "original" / "tokenizer.model"):
        if source.path.is_dir() and path.is_file():
            if source.layout == "hf" and not is_rank_file(path):  # SentencePiece: the same name
                continue
            return path.read_bytes(), read_sidecar(str(path))
    return source.vocabulary()


def open_tokenizer(source: Source, tokenizer_path: str | Path | None = None) -> Tokenizer:
    """The tokenizer at `tokenizer_path`; None: the one that came with the checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, or its size is not that of the model's vocabulary.
    """
    version = "llama3.1" if source.params.get("use_scaled_rope") else "llama3"  # the 3.1 releases
    if tokenizer_path is not None:
        tokenizer = Tokenizer(tokenizer_path, version)
    else:
        vocabulary = find_vocabulary(source)
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
