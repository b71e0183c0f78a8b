"""Encoding and splitting of long texts. Knows nothing about chat prompts.

"Piece" means what the split pattern of a tokenizer cuts from the text before BPE.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Literal

import tiktoken

from llama.text.rank_file import LLAMA3_PATTERN

# The stack of tiktoken's regex engine overflows on a whitespace run of almost 10^6 characters.
_LONG_WHITESPACE = re.compile(r"\s{100000}")
_CUT_POINT = re.compile(r"(?<=\S) (?=\S)")


def check_characters(
    s: str, pat_str: str, ranks: Mapping[bytes, int], missing_bytes: AbstractSet[int]
) -> None:
    """Check that a vocabulary can encode every character of `s`.

    Args:
        missing_bytes: the bytes that are not tokens by themselves.

    Raises:
        ValueError: it cannot; the message names the first such character.
    """
    s = s.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken does
    if missing_bytes.isdisjoint(s.encode()):
        return
    for piece in pieces(pat_str, s):
        if piece.encode() in ranks:
            continue
        for character in piece:
            if not missing_bytes.isdisjoint(character.encode()):
                raise ValueError(f"this tokenizer's vocabulary lacks {character!r}; remove it")


def encode_uncut(
    s: str,
    encoding: tiktoken.Encoding,
    pat_str: str,
    ranks: dict[bytes, int],
    allowed_special: Literal["all"] | AbstractSet[str],
    disallowed_special: Literal["all"] | Collection[str],
) -> list[int]:
    """`encoding.encode`, of all text.

    A very long run of whitespace is split by the `regex` package. So is text that the split pattern
    does not match: tiktoken drops it, and the `tokenizers` library encodes it.

    Args:
        pat_str, ranks: the split pattern and the ranks of `encoding`.

    Raises:
        ValueError: `s` contains a disallowed special token.
    """
    if not _LONG_WHITESPACE.search(s):
        t = encoding.encode(
            s, allowed_special=allowed_special, disallowed_special=disallowed_special
        )
        dropped = len(s.encode("utf-8", "surrogatepass")) - len(encoding.decode_bytes(t))
        if pat_str == LLAMA3_PATTERN or not dropped:
            return t
    specials = encoding.special_tokens_set
    allowed = specials if allowed_special == "all" else set(allowed_special)
    disallowed = specials if disallowed_special == "all" else disallowed_special
    for text in set(disallowed) - allowed:
        if text in s:
            raise ValueError(f"the text contains the disallowed special token {text!r}")
    one_piece = tiktoken.Encoding(
        name="one piece",
        pat_str=r"[\s\S]+",  # any text is one piece
        mergeable_ranks=ranks,
        special_tokens={},
    )
    special = "|".join(re.escape(text) for text in sorted(allowed, key=len, reverse=True))
    t = []
    for part in re.split(f"({special})", s) if special else [s]:
        if part in allowed:
            t.append(encoding.encode_single_token(part))
        else:
            for piece in pieces(pat_str, part):
                t.extend(one_piece.encode_ordinary(piece))
    return t


def pieces(pat_str: str, s: str) -> Iterator[str]:
    """What the split pattern matches, and the text between its matches, in order."""
    import regex

    end = 0
    for match in regex.finditer(pat_str, s):
        for piece in (s[end : match.start()], match.group()):
            if piece:
                yield piece
        end = match.end()
    if end < len(s):
        yield s[end:]


def passages(text: str, size: int) -> Iterator[str]:
    """Cut `text` into parts of at least `size` characters that encode to the ids of the whole text.

    A cut is made before a single space between two visible characters, where every known split
    pattern starts a new piece.
    """
    start = 0
    while start < len(text):
        cut = _CUT_POINT.search(text, start + size)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end
