"""Hugging Face's tokenizer.json and its settings -> a tiktoken rank file and its sidecar.

Nothing in the files is evaluated. Knows no weights and no chat templates: see `chat_settings`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llama.checkpoints.formats.bpe_ranks import (
    DIGITS_PATTERN,
    GPT2_PATTERN,
    gpt2_bytes,
    rank_file,
    sidecar,
)
from llama.common.files import damage, read_json
from llama.text.rank_file import TEXT_TOKEN_FLAGS

# Settings of tokenizer.json's BPE that a rank file cannot express; refused unless empty.
UNSUPPORTED_BPE = (
    "dropout",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
)


def read_vocabulary(folder: Path) -> tuple[bytes, dict[str, Any]] | None:
    """(rank file, sidecar) of a folder's tokenizer.json, see `llama.tokenizer`; None: it has none.

    Raises:
        ValueError: a damaged file, or a tokenizer that a rank file cannot express.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    spec = read_json(path)
    with damage(path):
        try:
            return _convert(spec, folder)
        except ValueError as e:
            raise ValueError(f"{path}: {e}; use the model's own tokenizer.model") from e


def is_rank_file(path: Path) -> bool:
    """Whether `path` is a tiktoken file, not a SentencePiece model of the same name."""
    if not path.is_file():
        return False
    with open(path, "rb") as f:
        first = f.readline(1000).split()
    return len(first) == 2 and first[1].isdigit()


def read_settings(folder: Path) -> dict[str, Any]:
    """special_tokens_map.json and tokenizer_config.json, which wins; {} if there is neither."""
    settings = _read_optional(folder / "special_tokens_map.json")
    return settings | _read_optional(folder / "tokenizer_config.json")


def _read_optional(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; {} if there is no such file."""
    return read_json(path) if path.is_file() else {}


def _convert(spec: dict[str, Any], folder: Path) -> tuple[bytes, dict[str, Any]]:
    model = spec["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"the tokenizer is a {model['type']}, not a BPE")
    for key in UNSUPPORTED_BPE:
        if model.get(key):
            raise ValueError(f"the BPE has {key} {model[key]!r}")
    if spec.get("normalizer"):
        raise ValueError(f"the text is normalized ({spec['normalizer'].get('type')})")
    pattern = split_pattern(spec.get("pre_tokenizer"))
    added = spec.get("added_tokens") or []
    special = {token["content"]: token["id"] for token in added}
    if not all(type(text) is str and type(i) is int for text, i in special.items()):
        raise ValueError("an added token is not a text with an id")
    in_text = {token["content"]: _flags(token) for token in added if not token.get("special")}
    flags = {token["content"]: _flags(token) for token in added if token.get("special")}
    tokens = {text: i for text, i in model["vocab"].items() if text not in special}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    ranks = rank_file(tokens, merges, whole_pieces=bool(model.get("ignore_merges")))
    settings = read_settings(folder)
    stops = stop_ids(folder)

    def id_of(role: str, texts: dict[str, int]) -> int | None:
        """The id of the token for `role` ("eos", "pad") in the settings."""
        token = settings.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        return texts.get(text) if text is not None else None

    ids = {*special.values(), *tokens.values()}
    known = [i for i in stops if i in ids]
    eos = id_of("eos", tokens | special)
    if eos is None:
        if not known:
            raise ValueError("neither tokenizer_config.json nor generation_config.json names EOS")
        eos = known[0]
    bos = _added_bos(spec.get("post_processor"))
    return ranks, sidecar(
        pattern,
        special,
        bos=bos,
        eos=eos,
        pad=id_of("pad", special),
        ordinary=tokens.values(),
        stop_ids=known,
        text_tokens=in_text,
        token_flags=flags,
    )


def _flags(token: dict[str, Any]) -> list[str]:
    """The flags of an added token, see `llama.text.text_tokens`."""
    return [flag for flag in TEXT_TOKEN_FLAGS if token.get(flag)]


def agrees(folder: Path, ranks: dict[bytes, int], special: dict[str, int]) -> bool:
    """Whether the tokenizer.json of a folder, if it has one, has these tokens and names.

    Reserved tokens may have any number in their names, and need not exist.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return True
    spec, byte_of = read_json(path), gpt2_bytes()
    try:
        added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
        plain = all(t.get("special") and not _flags(t) for t in spec.get("added_tokens") or [])
        tokens = {text: i for text, i in spec["model"]["vocab"].items() if text not in added}
        found = {bytes(byte_of[c] for c in text): i for text, i in tokens.items()}
    except KeyError:  # no byte-level BPE
        return False
    except (TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged ({e!r}); download it again") from e
    return found == ranks and plain and _named(added) == _named(special)


def _named(special: dict[str, int]) -> dict[str, int]:
    """The special tokens without those that Hugging Face's files call reserved."""
    unnamed = re.compile(r"<\|(reserved_special_token_\d+|step_id|image)\|>")
    return {text: i for text, i in special.items() if not unnamed.fullmatch(text)}


def split_pattern(pre_tokenizer: dict[str, Any] | None) -> str:
    """The regular expression with which a byte-level pre-tokenizer splits text.

    Raises:
        ValueError: another kind of pre-tokenizer.
    """
    top = pre_tokenizer or {}
    steps = top["pretokenizers"] if top.get("type") == "Sequence" else [top]
    kinds = [step.get("type") for step in steps]
    unknown = ValueError(f"the pre-tokenizer {kinds} is not of a known kind")
    if kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space", True):
        raise unknown
    gpt2 = steps[-1].get("use_regex", True)
    first = steps[0]
    if kinds == ["ByteLevel"] and gpt2:
        return GPT2_PATTERN
    if kinds == ["Digits", "ByteLevel"] and gpt2 and first.get("individual_digits"):
        return DIGITS_PATTERN
    isolated = first.get("behavior") == "Isolated" and not first.get("invert")
    if kinds == ["Split", "ByteLevel"] and not gpt2 and isolated and "Regex" in first["pattern"]:
        return _valid_pattern(first["pattern"]["Regex"])
    raise unknown


def _valid_pattern(pattern: str) -> str:
    """`pattern`, or a ValueError if it is not a regular expression."""
    import regex

    try:
        regex.compile(pattern)
    except regex.error as e:
        raise ValueError(
            f"the split pattern {pattern!r} is not a regular expression ({e})"
        ) from None
    return pattern


def _added_bos(post_processor: dict[str, Any] | None) -> int | None:
    """The id of the token that the post-processor puts before a text; None: none.

    transformers follows the post-processor and ignores add_bos_token if there is a tokenizer.json.
    """
    top = post_processor or {}
    steps = top["processors"] if top.get("type") == "Sequence" else [top]
    for step in steps:
        if step.get("type") == "TemplateProcessing":
            first = step["single"][0].get("SpecialToken")
            return step["special_tokens"][first["id"]]["ids"][0] if first else None
    return None


def stop_ids(folder: Path) -> list[int]:
    """The ids that end generation, from generation_config.json and config.json."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        found = _read_optional(folder / name).get("eos_token_id")
        for i in found if isinstance(found, list) else [found] if found is not None else []:
            if type(i) is not int:
                raise ValueError(f"{folder / name}: eos_token_id must be ids, not {found!r}")
            ids.append(i)
    return list(dict.fromkeys(ids))
