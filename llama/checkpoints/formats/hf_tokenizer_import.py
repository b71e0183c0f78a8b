"""Hugging Face's tokenizer.json and its settings -> a tiktoken rank file and its sidecar.

Nothing in the files is evaluated, chat templates included. Knows no weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama.checkpoints.formats.bpe_ranks import DIGITS_PATTERN, GPT2_PATTERN, rank_file, sidecar
from llama.common.files import damage, read_json

# Settings of tokenizer.json's BPE that a rank file cannot express; refused unless empty.
UNSUPPORTED_BPE = (
    "dropout",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
)


def read_vocabulary(folder: Path) -> tuple[bytes, dict[str, Any]] | None:
    """(rank file, sidecar) of a Hugging Face folder, see `llama.tokenizer`.

    None: the folder has a tiktoken rank file (`tokenizer.model`, `original/tokenizer.model`), which
    should be used instead, or no tokenizer.json.

    Raises:
        ValueError: a damaged file, or a tokenizer that a rank file cannot express.
    """
    if any(is_rank_file(folder / name) for name in ("tokenizer.model", "original/tokenizer.model")):
        return None
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
    special = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    tokens = {text: i for text, i in model["vocab"].items() if text not in special}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    ranks = rank_file(tokens, merges, whole_pieces=bool(model.get("ignore_merges")))
    settings = _read_optional(folder / "special_tokens_map.json")
    settings |= _read_optional(folder / "tokenizer_config.json")
    stops = list(_stop_ids(folder))

    def id_of(role: str) -> int | None:
        """The id of the special token for `role` ("eos", "pad") in the settings."""
        token = settings.get(f"{role}_token")
        text = token.get("content") if isinstance(token, dict) else token
        return special.get(text) if text is not None else None

    known = [i for i in stops if i in special.values()]
    eos = id_of("eos")
    if eos is None:
        if not known:
            raise ValueError("neither tokenizer_config.json nor generation_config.json names EOS")
        eos = known[0]
    bos = _added_bos(spec.get("post_processor"), special)
    template = _chat_template(folder, settings)
    spec = sidecar(pattern, special, bos=bos, eos=eos, pad=id_of("pad"), chat_template=template)
    if unknown := sorted(set(stops) - set(known)):
        warnings.warn(
            f"{folder}: stop tokens {unknown} are ignored: they are not special tokens",
            stacklevel=4,
        )
    text_of = {i: text for text, i in special.items()}
    stop_tokens = dict.fromkeys([*spec["stop_tokens"], *(text_of[i] for i in known)])
    return ranks, spec | {"stop_tokens": list(stop_tokens)}


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


def _added_bos(post_processor: dict[str, Any] | None, special: dict[str, int]) -> int | None:
    """The id of the special token that the post-processor puts before a text; None: none.

    transformers follows the post-processor and ignores add_bos_token if there is a tokenizer.json.
    """
    top = post_processor or {}
    steps = top["processors"] if top.get("type") == "Sequence" else [top]
    for step in steps:
        if step.get("type") == "TemplateProcessing":
            first = step["single"][0]
            return special[first["SpecialToken"]["id"]] if "SpecialToken" in first else None
    return None


def _stop_ids(folder: Path) -> Iterator[int]:
    """The ids that end generation, from generation_config.json or else config.json."""
    for name in ("generation_config.json", "config.json"):
        found = _read_optional(folder / name).get("eos_token_id")
        if found is not None:
            yield from found if isinstance(found, list) else [found]
            return


def _chat_template(folder: Path, settings: dict[str, Any]) -> str:
    """The text of the default chat template, from its own file or the settings."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template") or ""
    if isinstance(template, list):  # several named templates
        template = next((t["template"] for t in template if t["name"] == "default"), "")
    return str(template)
