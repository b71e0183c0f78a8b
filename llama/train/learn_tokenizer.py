"""Text -> a `tokenizer.model` and its sidecar file. Knows nothing about models or tensors."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

from llama.checkpoints.formats.bpe_ranks import rank_file, sidecar
from llama.common.daemon_thread import call_in_daemon
from llama.common.extras import install_line
from llama.common.files import replacing_file
from llama.common.progress import progress
from llama.text.long_text import passages
from llama.text.rank_file import LLAMA3_PATTERN, read_sidecar
from llama.tokenizer import Tokenizer

SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>")
# Every character is one piece. A piece that is a token is not split into bytes, so the single bytes
# need not be tokens.
CHARACTER_PATTERN = r"[\s\S]"
PASSAGE = 1 << 16  # characters that the `tokenizers` library gets at a time
LONGEST_WORD = 1000  # characters; training takes quadratic time in the length of a word


def learn(kind: str, texts: Iterable[str], training: Iterable[str], folder: Path) -> Path:
    """Write tokenizer.model and its sidecar tokenizer.model.json to `folder`; return the former.

    Args:
        kind: "char": every character of `texts` is a token. "bpe:N": byte-level BPE of N tokens,
            learned from `training`, with Llama 3's split pattern. Both add begin-of-text,
            end-of-text and padding tokens. Otherwise the path of a tokenizer.model, which is copied
            with its sidecar.
        texts: all text, so that the characters of the other splits are tokens too.
        training: the part of the text that a model is trained on.

    Raises:
        ValueError: an unknown kind, a missing file, or an N that does not fit the text.
        ImportError: "bpe:N" without the `tokenizers` package.
    """
    if kind == "char":
        ranks, spec = _learn_characters(texts)
    elif kind.startswith("bpe:"):
        ranks, spec = _learn_byte_pairs(kind, training)
    else:
        ranks, spec = _read_tokenizer(kind)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    sidecar_path = Path(f"{path}.json")
    if spec:
        with replacing_file(sidecar_path) as partial:
            text = json.dumps(spec, indent=2, ensure_ascii=False) + "\n"
            partial.write_bytes(text.encode())
    else:
        sidecar_path.unlink(missing_ok=True)
    with replacing_file(path) as partial:
        partial.write_bytes(ranks)
    return path


def _read_tokenizer(kind: str) -> tuple[bytes, dict[str, Any]]:
    """Contents of a rank file, and its sidecar's or {}."""
    if not Path(kind).is_file():
        raise ValueError(
            f"no tokenizer {kind!r}; use char, bpe:N (as bpe:1024) or the path of a tokenizer.model"
        )
    Tokenizer(kind)  # raises if the file is damaged
    return Path(kind).read_bytes(), read_sidecar(kind)


def _learn_characters(texts: Iterable[str]) -> tuple[bytes, dict[str, Any]]:
    """A token for each character, in the order of code points: rank file and sidecar."""
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise ValueError("the text is empty: no characters to learn")
    tokens = [character.encode() for character in sorted(characters)]
    ranks = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens))
    return ranks, _sidecar(CHARACTER_PATTERN, len(tokens))


def _learn_byte_pairs(kind: str, texts: Iterable[str]) -> tuple[bytes, dict[str, Any]]:
    """Byte-level BPE of the `tokenizers` library: rank file and sidecar."""
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError as e:
        raise ImportError(f"bpe:N needs a package: {install_line('train')}") from e
    size = kind.removeprefix("bpe:")
    least = 256 + len(SPECIAL_TOKENS)
    if not (size.isascii() and size.isdigit()) or int(size) < least:
        raise ValueError(
            f"the tokenizer {kind!r} must be bpe:N with N at least {least}: 256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens"
        )
    library = Tokenizer(models.BPE(ignore_merges=True))  # like tiktoken
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    cut = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{LONGEST_WORD}}}"), "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, cut, bytewise])
    trainer = trainers.BpeTrainer(
        vocab_size=int(size) - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    _train(library, trainer, progress(_passages(texts), "learning a tokenizer"))
    model = json.loads(library.to_str())["model"]
    tokens, merges = model["vocab"], model["merges"]
    if (n := len(tokens) + len(SPECIAL_TOKENS)) < int(size):
        raise ValueError(f"the text yields no more than {n} tokens; use bpe:{n} or less, or char")
    lines = (m if isinstance(m, str) else " ".join(m) for m in merges)
    return rank_file(tokens, lines, whole_pieces=True), _sidecar(LLAMA3_PATTERN, len(tokens))


def _train(library: Any, trainer: Any, passages: Iterable[str]) -> None:
    """Train in a thread, while this one waits for it: signals reach Python here, not in Rust."""
    stopped = False

    def until_stopped() -> Iterator[str]:
        for passage in passages:
            if stopped:
                return
            yield passage

    training = call_in_daemon(lambda: library.train_from_iterator(until_stopped(), trainer))
    try:
        while not training.done():
            wait([training], 0.1)  # in parts: on Windows a signal does not end a wait
        training.result()
    finally:
        stopped = True


def _passages(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from passages(text, PASSAGE)


def _sidecar(pat_str: str, n: int) -> dict[str, Any]:
    """A sidecar for `n` ordinary tokens."""
    special = {text: n + i for i, text in enumerate(SPECIAL_TOKENS)}
    return sidecar(pat_str, special, n, n + 1, n + 2)
