"""Splitting text where tiktoken's own regex engine fails. Knows pieces, not prompts."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Literal

import tiktoken

# tiktoken's regex engine runs out of stack on a whitespace run of somewhat under 10^6 characters.
_LONG_WHITESPACE = re.compile(r"\s{100000}")
_CUT = re.compile(r"(?<=\S) (?=\S)")


def check_characters(
    s: str, pat_str: str, ranks: Mapping[bytes, int], lacking: AbstractSet[int]
) -> None:
    """Name the first character that a vocabulary has no tokens for.

    Args:
        lacking: the bytes that are no token of their own.

    Raises:
        ValueError: there is one.
    """
    import regex

    s = s.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # as tiktoken does
    if lacking.isdisjoint(s.encode()):
        return
    for piece in regex.findall(pat_str, s):
        if piece.encode() in ranks:
            continue
        for character in piece:
            if not lacking.isdisjoint(character.encode()):
                raise ValueError(f"this tokenizer's vocabulary lacks {character!r}; remove it")


def encode_uncut(
    s: str,
    encoding: tiktoken.Encoding,
    pat_str: str,
    ranks: dict[bytes, int],
    allowed_special: Literal["all"] | AbstractSet[str],
    disallowed_special: Literal["all"] | Collection[str],
) -> list[int]:
    """`encoding.encode`, with a regex engine that does not overflow where tiktoken's would.

    Args:
        pat_str, ranks: those that `encoding` was made of.
    """
    if not _LONG_WHITESPACE.search(s):
        return encoding.encode(
            s, allowed_special=allowed_special, disallowed_special=disallowed_special
        )
    import regex

    specials = encoding.special_tokens_set
    allowed = specials if allowed_special == "all" else set(allowed_special)
    refused = specials if disallowed_special == "all" else disallowed_special
    for text in set(refused) - allowed:
        if text in s:
            raise ValueError(f"the text contains the disallowed special token {text!r}")
    one_piece = tiktoken.Encoding(
        name="one piece",
        pat_str=r"[\s\S]+",  # the whole text is one piece
        mergeable_ranks=ranks,
        special_tokens={},
    )
    special = "|".join(re.escape(text) for text in sorted(allowed, key=len, reverse=True))
    t: list[int] = []
    for part in re.split(f"({special})", s) if special else [s]:
        if part in allowed:
            t.append(encoding.encode_single_token(part))
        else:
            for piece in regex.finditer(pat_str, part):
                t.extend(one_piece.encode_ordinary(piece.group()))
    return t


def passages(text: str, size: int) -> Iterator[str]:
    """Cut `text` into parts of `size` characters or a little more, which encode as the whole does.

    It is cut before a space between two visible characters, which no known split pattern joins.
    """
    start = 0
    while start < len(text):
        cut = _CUT.search(text, start + size)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end
