"""Reader of `tokenizer.model` and its sidecar, `tokenizer.model.json`. Does not encode text.

"Rank" here means the merge priority of a BPE token, which is also its id.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Any

from llama.common.files import read_json
from llama.text.split_pattern import check_pattern

# Llama 3's split pattern; a sidecar may have another one (see `Tokenizer`).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_SPECIAL_TOKENS = 256
CHAT_FORMATS = ("llama3", "chatml", "template")
# How a token that is recognised in text treats the text beside it, see `llama.text.text_tokens`.
TEXT_TOKEN_FLAGS = ("lstrip", "rstrip", "single_word")

# The first special tokens of each release, in the order of ids; None is a reserved token.
SPECIAL_TOKENS: dict[str, tuple[str | None, ...]] = {
    "llama3": (
        "<|begin_of_text|>", "<|end_of_text|>", None, None, None, None,
        "<|start_header_id|>", "<|end_header_id|>", None, "<|eot_id|>",
    ),
    "llama3.1": (
        "<|begin_of_text|>", "<|end_of_text|>", None, None, "<|finetune_right_pad_id|>",
        "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>",
        "<|python_tag|>", "<|image|>",
    ),
}  # fmt: skip


def special_token_table(version: str, first_id: int) -> dict[str, int]:
    """The 256 special tokens of `version` ("llama3" or "llama3.1"), numbered from `first_id`."""
    if version not in SPECIAL_TOKENS:
        raise ValueError(f"unknown special tokens {version!r}; use one of {list(SPECIAL_TOKENS)}")
    named = SPECIAL_TOKENS[version]
    names: list[str] = []
    reserved = 0
    for i in range(N_SPECIAL_TOKENS):
        name = named[i] if i < len(named) else None
        if name is None:
            name = f"<|reserved_special_token_{reserved}|>"
            reserved += 1
        names.append(name)
    return {name: first_id + i for i, name in enumerate(names)}


def read_ranks(model_path: str) -> dict[bytes, int]:
    """Read a rank file from a local path or a remote URL: {token: rank}.

    tiktoken's own loader is not used because it caches by path: it would return the old vocabulary
    after the file has been replaced.

    Raises:
        FileNotFoundError, ValueError: there is no file, or it is not a rank file.
    """
    if "://" in model_path:
        import blobfile

        with blobfile.BlobFile(model_path, "rb") as f:
            return parse_ranks(f.read(), model_path)
    path = Path(os.path.expanduser(model_path))
    if not path.is_file():
        raise FileNotFoundError(
            f"no tokenizer at {model_path}; give the path of the checkpoint's tokenizer.model file"
        )
    return parse_ranks(path.read_bytes(), model_path)


def parse_ranks(data: bytes, where: str) -> dict[bytes, int]:
    """Parse a rank file, with one `base64(token) rank` per line: {token: rank}.

    Raises:
        ValueError: it is damaged; `where` names the file in the message.
    """
    if data.lstrip()[:1] == b"{":
        raise ValueError(
            f"{where} is JSON, not a tiktoken rank file; a tokenizer.json is read from the "
            "checkpoint's folder: give that folder without tokenizer_path, or the path of a "
            "tokenizer.model"
        )
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{where}, line {number} is not 'base64-token rank': this is not a tiktoken "
                "rank file (perhaps a web page or a Git-LFS pointer); download it again"
            ) from None
    if len(set(ranks.values())) != len(ranks) or not ranks:
        raise ValueError(f"{where} is empty or has an id twice; download it again")
    return ranks


def default_spec(version: str, first_id: int) -> dict[str, Any]:
    """The contents of a sidecar that would describe an official `tokenizer.model`."""
    special = special_token_table(version, first_id)
    stop = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
    pad = "<|finetune_right_pad_id|>"
    return {
        "pat_str": LLAMA3_PATTERN,
        "special_tokens": special,
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "pad_token": pad if pad in special else None,
        "stop_tokens": [text for text in stop if text in special],
        "text_tokens": {},
        "token_flags": {},
        "unused_ids": [],
        "chat_format": "llama3",
        "default_system": None,
        "chat_bos": None,
        "chat_templates": {},
        "template_tokens": {},
    }


def read_sidecar(model_path: str) -> dict[str, Any]:
    """The contents of the sidecar of `model_path`; {} if it has none.

    Raises:
        ValueError: the sidecar is not a JSON object with known keys.
    """
    path = Path(os.path.expanduser(model_path + ".json"))
    if "://" in model_path or not path.is_file():
        return {}
    sidecar = read_json(path)
    known = set(default_spec("llama3", 0))
    if set(sidecar) - known:
        raise ValueError(f"{path} must be a JSON object with keys among {sorted(known)}")
    return sidecar


def check_types(spec: dict[str, Any], where: str) -> None:
    """Check the types of a sidecar's values.

    Raises:
        ValueError: one is wrong; `where` names the file in the message.
    """
    for keys, kind, fits in _TYPES:
        for key in keys:
            if not fits(spec[key]):
                raise ValueError(f"{where}: {key} must be {kind}, not {spec[key]!r:.80}")


def _is_list(value: object, *types: type) -> bool:
    return isinstance(value, list) and all(type(item) in types for item in value)


def _is_table(value: object, fits: Callable[[Any], bool]) -> bool:
    """Whether `value` is a dict whose values all fit."""
    return isinstance(value, dict) and all(map(fits, value.values()))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flags(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_is_text, value))


# (keys of a sidecar, the type of their values in words, its check).
_TYPES: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (("bos_token", "eos_token", "pad_token"), "a text", lambda v: type(v) in (str, int, NoneType)),
    (("chat_format", "default_system", "chat_bos"), "a text", lambda v: type(v) in (str, NoneType)),
    (("special_tokens",), "{text: id}", lambda v: _is_table(v, lambda i: type(i) is int)),
    (("stop_tokens",), "a list of texts or ids", lambda v: _is_list(v, str, int)),
    (("unused_ids",), "a list of ids", lambda v: _is_list(v, int)),
    (("text_tokens", "token_flags"), "{text: [flag, ...]}", lambda v: _is_table(v, _is_flags)),
    (("pat_str",), "a text", _is_text),
    (("chat_templates", "template_tokens"), "an object of texts", lambda v: _is_table(v, _is_text)),
)


def check_spec(spec: dict[str, Any], ranks: dict[bytes, int], where: str) -> None:
    """Check that ranks, special tokens and unused ids together are each id from 0 on exactly once.

    Raises:
        ValueError: they are not, or `spec` names an unknown token or chat format.
    """
    check_types(spec, f"{where}.json")
    check_pattern(spec["pat_str"], f"{where}.json")
    special = spec["special_tokens"]
    if "" in special:
        raise ValueError(
            f"{where}.json has a special token without text (id {special['']}): give it a text"
        )
    ids = [*ranks.values(), *special.values(), *spec["unused_ids"]]
    if clash := set(special.values()) & set(ranks.values()):
        raise ValueError(
            f"{where} and its .json both use the ids {sorted(clash)[:3]}: they do not belong "
            "together, or one is damaged; download both again"
        )
    if sorted(ids) != list(range(len(ids))):
        gap = min(set(range(len(ids))) - set(ids), default=len(ids))
        raise ValueError(f"{where} has no token with id {gap}: it is damaged; download it again")
    roles = [spec[f"{role}_token"] for role in ("bos", "eos", "pad")]
    named = {*roles, *spec["stop_tokens"], *spec["text_tokens"]}
    if unknown := named - set(special) - set(ranks.values()) - {None}:
        raise ValueError(f"{where}.json uses special tokens that it does not list: {unknown}")
    for key in ("text_tokens", "token_flags"):
        if {flag for flags in spec[key].values() for flag in flags} - set(TEXT_TOKEN_FLAGS):
            raise ValueError(f"{where}.json: {key} may have the flags {TEXT_TOKEN_FLAGS}")
    if spec["chat_format"] not in (None, *CHAT_FORMATS):
        raise ValueError(f"{where}.json: chat_format must be one of {CHAT_FORMATS}")
    if spec["chat_bos"] is not None and spec["chat_bos"] not in special:
        raise ValueError(f"{where}.json: chat_bos must be null or a special token")
