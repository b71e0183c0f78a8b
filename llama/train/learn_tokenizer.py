"""Text -> a `tokenizer.model` and its sidecar. Knows no ids of a corpus and no tensors."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llama.checkpoints.formats.bpe_ranks import rank_file, sidecar
from llama.common.progress import progress
from llama.text.long_text import passages
from llama.text.rank_file import LLAMA3_PATTERN, read_sidecar
from llama.tokenizer import Tokenizer

SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>")
# One character a piece: a piece that is a token is taken whole, so none of its bytes need be one.
CHARACTER_PATTERN = r"[\s\S]"
PASSAGE = 1 << 16  # characters handed to the library at a time


def learn(kind: str, texts: Iterable[str], training: Iterable[str], folder: Path) -> Path:
    """Write `folder`/tokenizer.model and tokenizer.model.json; return the former's path.

    Args:
        kind: "char": every character of `texts` is a token. "bpe:N": byte-level BPE of N ids,
            learnt from `training`, split as Llama 3 splits. Both add begin-of-text, end-of-text
            and pad. Anything else: the path of a tokenizer.model, copied with its sidecar.
        texts: all of the text, so that the characters of the held-out parts are known too.
        training: the part of it that a model is trained on.

    Raises:
        ValueError: no such kind, no such file, or N does not suit the text.
        ImportError: "bpe:N" without the `tokenizers` package.
    """
    if kind == "char":
        ranks, spec = _characters(texts)
    elif kind.startswith("bpe:"):
        ranks, spec = _byte_pairs(kind, training)
    else:
        ranks, spec = _given(kind)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    beside = Path(f"{path}.json")
    if spec:
        text = json.dumps(spec, indent=2, ensure_ascii=False) + "\n"
        _replace(beside, text.encode())
    else:
        beside.unlink(missing_ok=True)
    _replace(path, ranks)
    return path


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _given(kind: str) -> tuple[bytes, dict[str, Any]]:
    if not Path(kind).is_file():
        raise ValueError(
            f"no tokenizer {kind!r}; use char, bpe:N (as bpe:1024) or the path of a tokenizer.model"
        )
    Tokenizer(kind)  # says what is wrong with it
    return Path(kind).read_bytes(), read_sidecar(kind)


def _characters(texts: Iterable[str]) -> tuple[bytes, dict[str, Any]]:
    """A token for each character, in code point order."""
    found: set[str] = set()
    for text in texts:
        found.update(text)
    if not found:
        raise ValueError("the text is empty: no characters to learn")
    tokens = [character.encode() for character in sorted(found)]
    ranks = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
    return ranks, _sidecar(CHARACTER_PATTERN, len(tokens))


def _byte_pairs(kind: str, texts: Iterable[str]) -> tuple[bytes, dict[str, Any]]:
    """The `tokenizers` library's byte-level BPE, as ranks."""
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError as e:
        raise ImportError("bpe:N needs a package: pip install 'llama3[train]'") from e
    size = kind.removeprefix("bpe:")
    least = 256 + len(SPECIAL_TOKENS)
    if not (size.isascii() and size.isdigit()) or int(size) < least:
        raise ValueError(
            f"the tokenizer {kind!r} must be bpe:N with N at least {least}: 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens"
        )
    library = Tokenizer(models.BPE(ignore_merges=True))  # as tiktoken: a piece that is a token
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    trainer = trainers.BpeTrainer(
        vocab_size=int(size) - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(progress(_passages(texts), "learning a tokenizer"), trainer)
    model = json.loads(library.to_str())["model"]
    tokens, merges = model["vocab"], model["merges"]
    if (n := len(tokens) + len(SPECIAL_TOKENS)) < int(size):
        raise ValueError(f"the text gives no more than {n} tokens; use bpe:{n} or less, or char")
    lines = (m if isinstance(m, str) else " ".join(m) for m in merges)
    return rank_file(tokens, lines, whole_pieces=True), _sidecar(LLAMA3_PATTERN, len(tokens))


def _passages(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from passages(text, PASSAGE)


def _sidecar(pat_str: str, n: int) -> dict[str, Any]:
    special = {text: n + i for i, text in enumerate(SPECIAL_TOKENS)}
    return sidecar(pat_str, special, n, n + 1, n + 2, "")
