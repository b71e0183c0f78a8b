"""A path -> an open checkpoint and its tokenizer. The layout is recognised by the content."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from llama.checkpoints.download import hub_name
from llama.checkpoints.formats.chat_settings import chat_settings
from llama.checkpoints.formats.meta import QUANTIZATION, MetaSource, read_params
from llama.checkpoints.formats.quantized import QuantizedSource
from llama.checkpoints.locate import checkpoint_folder, expand, only_gguf
from llama.checkpoints.source import Source
from llama.common.files import damage
from llama.common.listing import listing
from llama.text.rank_file import default_spec, parse_ranks, read_sidecar
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")
# Rows without a token that a model may have beside as many as it has tokens: padding to a multiple.
MOST_PADDING = 1024
ADAPTER_CONFIG = "adapter_config.json"


def open_checkpoint(path: str | Path) -> Source:
    """Open a folder in Meta's or Hugging Face's layout, a GGUF file, or a folder with one GGUF.

    Args:
        path: also a repository's folder in Hugging Face's cache, or a folder above `original`.

    Raises:
        FileNotFoundError: no such path, or no checkpoint in it.
        ValueError: the checkpoint is damaged or of another architecture.
        ImportError: the extra that reads this layout is not installed.
    """
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        raise TypeError(f"ckpt_dir must be the path of a checkpoint, not {path!r}")
    name, path = hub_name(str(path)), expand(path)
    if name is not None and not path.exists():
        raise FileNotFoundError(
            f"no checkpoint at {path}; if it is a repository of the Hugging Face hub, "
            f"`llama3 download {name}` fetches it and prints the folder to give instead"
        )
    with damage(path):
        return _open(checkpoint_folder(path))


def _open(path: Path) -> Source:
    if path.is_file():
        with open(path, "rb") as f:
            magic = f.read(4)
        if magic == b"GGUF":
            from llama.checkpoints.formats.gguf import GGUFSource

            return GGUFSource(path)
        raise ValueError(
            f"{path} is a file that is not a GGUF; give the folder that contains params.json or "
            f"config.json, perhaps {path.parent}"
        )
    if path.is_dir() and not (path / "params.json").is_file():
        has_config = (path / "config.json").is_file()
        if (path / ADAPTER_CONFIG).is_file() and not has_config:
            raise ValueError(
                f"{path} is an adapter, not a checkpoint; give its base as the checkpoint and this "
                "folder as --adapter (Llama.build(base, adapter=...)), or make a checkpoint of "
                f"both: llama3 merge BASE {path} OUT"
            )
        if not (has_config and any(path.glob("*.safetensors"))):
            gguf = only_gguf(path)  # repositories of GGUF files may have a config.json too
            if gguf is not None:
                return open_checkpoint(gguf)
        if has_config:
            from llama.checkpoints.formats.hf import HFSource

            return HFSource(path)
    return QuantizedSource(path) if QUANTIZATION in read_params(path) else MetaSource(path)


def find_vocabulary(source: Source) -> tuple[bytes, dict[str, Any]] | None:
    """(content of tokenizer.model, its sidecar or {}) of an open checkpoint; None: it has none.

    A tokenizer.json decides where it differs from a tokenizer.model without a sidecar.

    Raises:
        ValueError: the tokenizer is damaged, or a rank file cannot express it.
    """
    found = _stored_vocabulary(source)
    return found and (found[0], with_chat(source, *found))


def with_chat(source: Source, rank_file: bytes, sidecar: dict[str, Any]) -> dict[str, Any]:
    """`sidecar` and how the checkpoint's chats are prompted, unless it says so itself.

    Raises:
        ValueError: the files with the chat template are damaged.
    """
    stored = source.chat_templates()
    if "chat_templates" in sidecar or not (stored.sources or stored.add_bos):
        return sidecar
    spec = sidecar if "special_tokens" in sidecar else explicit_spec(source, rank_file, sidecar)
    return sidecar | chat_settings(stored, spec)


def explicit_spec(source: Source, rank_file: bytes, sidecar: dict[str, Any]) -> dict[str, Any]:
    """`sidecar` with the values of all keys that it lacks, see `Tokenizer`."""
    first_id = max(parse_ranks(rank_file, str(source.path)).values()) + 1
    return default_spec(_release(source), first_id) | sidecar


def _stored_vocabulary(source: Source) -> tuple[bytes, dict[str, Any]] | None:
    """`find_vocabulary` without what the chat template says."""
    from llama.checkpoints.formats.hf_tokenizer_import import is_rank_file

    if source.replaces_vocabulary:
        return source.vocabulary()
    folder = source.path if source.path.is_dir() else source.path.parent
    for path in (folder / "tokenizer.model", folder / "original" / "tokenizer.model"):
        if source.path.is_dir() and path.is_file():
            if source.layout == "hf" and not is_rank_file(path):  # SentencePiece: the same name
                continue
            sidecar = read_sidecar(str(path))
            return (path.read_bytes(), sidecar) if sidecar else _reconciled(source, path)
    return source.vocabulary()


def _reconciled(source: Source, path: Path) -> tuple[bytes, dict[str, Any]]:
    """The rank file `path` and more ids that end a turn; or the tokenizer.json that differs."""
    from llama.checkpoints.formats.hf_tokenizer_import import agrees, read_vocabulary

    data = path.read_bytes()
    ranks = parse_ranks(data, str(path))
    spec = default_spec(_release(source), max(ranks.values()) + 1)
    special: dict[str, int] = spec["special_tokens"]
    if not agrees(source.path, ranks, special):
        try:
            if vocabulary := read_vocabulary(source.path):
                return vocabulary
        except ValueError as e:
            warnings.warn(
                f"{path} is used, and the tokenizer.json of its model has other tokens and cannot "
                f"be read: {e}",
                stacklevel=4,
            )
    name_of = {i: i for i in ranks.values()} | {i: text for text, i in special.items()}
    stops = [name_of[i] for i in source.stop_ids() if i in name_of]
    more = [stop for stop in stops if stop not in spec["stop_tokens"]]
    return data, {"stop_tokens": spec["stop_tokens"] + more} if more else {}


def _release(source: Source) -> str:
    """Whose special tokens a rank file without a sidecar has, see `Tokenizer`."""
    return "llama3.1" if source.params.get("use_scaled_rope") else "llama3"


def open_tokenizer(source: Source, tokenizer_path: str | Path | None = None) -> Tokenizer:
    """The tokenizer at `tokenizer_path`; None: the one that came with the checkpoint.

    This is the only check of a vocabulary against a model's rows; see `fit_to_rows`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, or it is not of this model.
    """
    if tokenizer_path is not None:
        path = expand(tokenizer_path)
        if path.is_file():
            data = path.read_bytes()
            sidecar = with_chat(source, data, read_sidecar(str(path)))
            tokenizer = Tokenizer.from_vocabulary(data, sidecar, str(path), _release(source))
        else:  # an address, or nothing
            tokenizer = Tokenizer(tokenizer_path, _release(source))
        fit_to_rows(tokenizer, source.params["vocab_size"], tokenizer_path)
        stops = [*tokenizer.stop_tokens, *source.stop_ids()]
        tokenizer.stop_tokens = list(dict.fromkeys(stops))
        return tokenizer
    vocabulary = find_vocabulary(source)
    if vocabulary is None:
        raise FileNotFoundError(
            f"{source.path} has no tokenizer; give the path of its tokenizer.model"
        )
    return tokenizer_of(source, vocabulary)


def tokenizer_of(source: Source, vocabulary: tuple[bytes, dict[str, Any]]) -> Tokenizer:
    """The tokenizer of what `find_vocabulary` found, checked as by `open_tokenizer`."""
    tokenizer = Tokenizer.from_vocabulary(*vocabulary, str(source.path), _release(source))
    fit_to_rows(tokenizer, source.params["vocab_size"], source.path)
    return tokenizer


def fit_to_rows(tokenizer: Tokenizer, rows: int, path: str | Path) -> None:
    """Check that a tokenizer belongs to a model with `rows` rows of embeddings.

    Rows may be padded: their ids are the tokenizer's `unused_ids` then. Special tokens may lack
    rows: a warning says so, and the engine refuses their ids.

    Args:
        path: of the tokenizer, for messages.

    Raises:
        ValueError: an ordinary token or the begin token lacks a row, or most rows lack a token.
    """
    tokens = tokenizer.n_words
    needed = max(*tokenizer.ranks.values(), tokenizer.bos_id) + 1
    if rows < needed or rows - tokens > max(tokens, MOST_PADDING):
        raise ValueError(
            f"{path} has {tokens} tokens and the model {rows}; "
            "give the tokenizer.model that came with the checkpoint (and beside it its "
            "tokenizer.model.json, if it came with one)"
        )
    if rows < tokens:
        over = {text: i for text, i in tokenizer.special_tokens.items() if i >= rows}
        names = listing([f"{text} ({i})" for text, i in over.items()], 3)
        warnings.warn(
            f"{path} has {tokens} tokens and the model {rows} rows: it cannot be given {names}",
            stacklevel=3,
        )
    elif rows > tokens:
        log.info("%s: the ids %d to %d have no token and are never drawn", path, tokens, rows - 1)
    tokenizer.pad_to(rows)
