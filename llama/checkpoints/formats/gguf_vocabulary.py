"""The vocabulary of a GGUF file -> a tiktoken rank file and its sidecar. Knows no tensors."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from llama.checkpoints.formats.bpe_ranks import (
    DIGITS_PATTERN,
    GPT2_PATTERN,
    rank_file,
    sidecar,
)
from llama.text.rank_file import LLAMA3_PATTERN


class Keys(Protocol):
    """The metadata of a file, see `gguf._File`."""

    path: Path

    def get(self, key: str, default: Any = None) -> Any: ...

    def need(self, key: str) -> Any: ...


class PreTokenizer(NamedTuple):
    """How a file's `tokenizer.ggml.pre` splits text.

    Attributes:
        pattern: the split pattern.
        llama3: a piece that is one token is not merged, and a begin token is added by default.
    """

    pattern: str
    llama3: bool = False


# `tokenizer.ggml.pre` by the pattern that llama.cpp splits with and what it sets for the name
# (src/llama-vocab.cpp: llm_tokenizer_bpe, llama_vocab::impl::load). Its patterns for GPT-2 and
# digits leave out the last alternative, for the same pieces.
NAMES: dict[PreTokenizer, tuple[str, ...]] = {
    PreTokenizer(LLAMA3_PATTERN, llama3=True): (
        "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
        "jina-v5-nano",
    ),
    PreTokenizer(LLAMA3_PATTERN): ("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"),
    PreTokenizer(DIGITS_PATTERN): (
        "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
    ),
    PreTokenizer(GPT2_PATTERN): (
        "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling",
    ),
}  # fmt: skip
PRE_TOKENIZERS = {name: pre for pre, names in NAMES.items() for name in names}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # `tokenizer.ggml.token_type`
ROLES = ("bos", "eos", "eot", "eom", "padding")
WAY_OUT = "give the model's own tokenizer.model as tokenizer_path"


def read_vocabulary(file: Keys) -> tuple[bytes, dict[str, Any]] | None:
    """(rank file, sidecar), see `Source.vocabulary`; None for another kind of vocabulary than BPE.

    Raises:
        ValueError: a vocabulary that a rank file cannot express.
    """
    if file.get("tokenizer.ggml.model") != "gpt2":
        return None
    ids = {role: file.get(f"tokenizer.ggml.{role}_token_id") for role in ROLES}
    ordinary, special, in_text = _read_tokens(file, ids)
    pre = _pre_tokenizer(file, special)
    if not file.get("tokenizer.ggml.add_bos_token", pre.llama3):
        ids["bos"] = None
    elif ids["bos"] is None:
        file.need("tokenizer.ggml.bos_token_id")
    ends = stop_ids(file)
    if not ends:
        file.need("tokenizer.ggml.eos_token_id")
    if ids["padding"] in ordinary.values():  # some files name an ordinary token, which cannot pad
        ids["padding"] = None
    try:
        return _rank_file(file, ordinary, pre), sidecar(
            pre.pattern,
            special,
            bos=ids["bos"],
            eos=ends[0],
            pad=ids["padding"],
            ordinary=ordinary.values(),
            stop_ids=ends,
            text_tokens=dict.fromkeys(in_text, ()),
        )
    except ValueError as e:
        raise ValueError(f"{file.path}: {e}; {WAY_OUT}") from e


def stop_ids(file: Keys) -> list[int]:
    """The ids that end generation."""
    ids = [file.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    return [i for i in ids if i is not None]


def _pre_tokenizer(file: Keys, special: dict[str, int]) -> PreTokenizer:
    """How the file's vocabulary splits text."""
    name = file.get("tokenizer.ggml.pre")
    unnamed = name in (None, "default")  # as in files of the first weeks of Llama 3
    if unnamed and "<|begin_of_text|>" in special:
        name = "llama-bpe"
    if name not in PRE_TOKENIZERS:
        what = "has no 'tokenizer.ggml.pre'" if name is None else f"unknown pre-tokenizer {name!r}"
        raise ValueError(
            f"{file.path}: {what}; {WAY_OUT}, or name one of {', '.join(PRE_TOKENIZERS)} if "
            "that is how it splits text: gguf-new-metadata --pre-tokenizer NAME IN OUT"
        )
    return PRE_TOKENIZERS[name]


def _rank_file(file: Keys, ordinary: dict[str, int], pre: PreTokenizer) -> bytes:
    """See `rank_file`. Llama 3's vocabulary needs whole pieces under every name."""
    merges = file.need("tokenizer.ggml.merges")
    try:
        return rank_file(ordinary, merges, whole_pieces=pre.llama3)
    except ValueError as e:
        if pre.pattern != LLAMA3_PATTERN or pre.llama3:
            raise
        ranks = rank_file(ordinary, merges, whole_pieces=True)
        warnings.warn(
            f"{file.path}: {e}: such tokens are used where they are a whole piece of text, as in "
            "Llama 3's own tokenizer; llama.cpp never uses them in this file",
            stacklevel=6,
        )
        return ranks


def _read_tokens(
    file: Keys, ids: dict[str, int | None]
) -> tuple[dict[str, int], dict[str, int], list[str]]:
    """Tokens of the file.

    Args:
        ids: {role: id} of tokens that have a role.

    Returns:
        {text: id} of the ordinary tokens, in GPT-2's characters, {text: id} of the special tokens,
        and the special tokens that text stands for. Unused ids, such as padding, are in none.
    """
    tokens, types = file.need("tokenizer.ggml.tokens"), file.need("tokenizer.ggml.token_type")
    if len(tokens) != len(types):
        raise ValueError(f"{file.path}: {len(tokens)} tokens, {len(types)} types; {WAY_OUT}")
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{file.path}: two tokens have the same text; convert the model again")
    ordinary, special, in_text = {}, {}, []
    for i, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind not in (NORMAL, CONTROL, USER_DEFINED, UNUSED):
            raise ValueError(f"{file.path}: token {text!r} is of type {kind}, unknown in a BPE")
        if kind == NORMAL:
            ordinary[text] = i
        elif kind != UNUSED or i in ids.values():
            special[text] = i
        if kind == USER_DEFINED:
            in_text.append(text)
    return ordinary, special, in_text
