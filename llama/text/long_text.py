"""Encoding and splitting of long texts. Knows nothing about chat prompts.

"Piece" means what the split pattern of a tokenizer cuts from the text before BPE.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from typing import Literal

import tiktoken

from llama.text.rank_file import LLAMA3_PATTERN

# The stack of tiktoken's regex engine overflows on a whitespace run of almost 10^6 characters.
_SAFE_WHITESPACE = 50_000
_WHITESPACE = re.compile(rf"\s{{{_SAFE_WHITESPACE}}}")
_CUT_POINT = re.compile(r"(?<=\S) (?=\S)")
_PROBE = "It's  12,345 \u00fcber\t\u6f22\u5b57...\r\n\n  (x)\n \U0001f600 "  # of every class in use
_PROBE_SECONDS = 5.0


def make_encoding(
    name: str, pat_str: str, ranks: dict[bytes, int], special_tokens: dict[str, int]
) -> tiktoken.Encoding:
    """A tiktoken encoding whose split pattern has been tried.

    Raises:
        ValueError: the pattern is not valid, or matches the empty text, where tiktoken panics.
    """
    import regex

    try:
        encoding = tiktoken.Encoding(
            name=name, pat_str=pat_str, mergeable_ranks=ranks, special_tokens=special_tokens
        )
        pattern = regex.compile(pat_str)
        for text in ("", _PROBE):
            for piece in pattern.finditer(text, timeout=_PROBE_SECONDS):
                if not piece.group():
                    raise ValueError("it matches the empty text")
    except Exception as e:  # whatever two parsers of patterns raise
        raise ValueError(
            f"{name}: the split pattern {pat_str!r} cannot be used: {e}; get the tokenizer again"
        ) from None
    return encoding


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


class UncutEncoder:
    """`encoding.encode`, of all text.

    A very long run of whitespace is split by the `regex` package. So is text that the split pattern
    does not match: tiktoken drops it, and the `tokenizers` library encodes it.

    Args:
        pat_str, ranks: the split pattern and the ranks of `encoding`.
    """

    def __init__(self, encoding: tiktoken.Encoding, pat_str: str, ranks: dict[bytes, int]):
        self.encoding, self.pat_str, self.ranks = encoding, pat_str, ranks

    def encode(
        self,
        s: str,
        allowed_special: Literal["all"] | AbstractSet[str],
        disallowed_special: Literal["all"] | Collection[str],
    ) -> list[int]:
        """See the class.

        Raises:
            ValueError: `s` contains a disallowed special token, or the pattern cannot split it.
        """
        try:
            if not has_long_whitespace(s):
                t = self.encoding.encode(
                    s, allowed_special=allowed_special, disallowed_special=disallowed_special
                )
                if self.pat_str == LLAMA3_PATTERN or self._is_all(t, s):
                    return t
            return self._encode_pieces(s, allowed_special, disallowed_special)
        except BaseException as e:
            if type(e).__name__ != "PanicException":  # of tiktoken; it is not an Exception
                raise
            raise ValueError(
                f"the split pattern {self.pat_str!r} cannot split this text: {e}"
            ) from None

    def _is_all(self, t: list[int], s: str) -> bool:
        """Whether `t` has as many bytes as `s`, and so all of its text."""
        return len(self.encoding.decode_bytes(t)) == len(s.encode("utf-8", "surrogatepass"))

    def _encode_pieces(
        self,
        s: str,
        allowed_special: Literal["all"] | AbstractSet[str],
        disallowed_special: Literal["all"] | Collection[str],
    ) -> list[int]:
        """`encoding.encode` with the split pattern run by the `regex` package."""
        specials = self.encoding.special_tokens_set
        allowed = specials if allowed_special == "all" else set(allowed_special)
        disallowed = specials if disallowed_special == "all" else disallowed_special
        for text in set(disallowed) - allowed:
            if text in s:
                raise ValueError(f"the text contains the disallowed special token {text!r}")
        special = "|".join(re.escape(text) for text in sorted(allowed, key=len, reverse=True))
        t = []
        for part in re.split(f"({special})", s) if special else [s]:
            if part in allowed:
                t.append(self.encoding.encode_single_token(part))
            else:
                for piece in pieces(self.pat_str, part):
                    t.extend(self._one_piece.encode_ordinary(piece))
        return t

    @functools.cached_property
    def _one_piece(self) -> tiktoken.Encoding:
        return one_piece_encoding(self.ranks)  # made late: it is slow, and rarely used


def one_piece_encoding(ranks: dict[bytes, int]) -> tiktoken.Encoding:
    """An encoding that takes any text as one piece."""
    return tiktoken.Encoding(
        name="one piece", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={}
    )


def has_long_whitespace(s: str) -> bool:
    """Whether `s` has a run of 100,000 whitespace characters; perhaps also for half as many.

    Looks at blocks of 50,000, one of which such a run fills. A search at every position would take
    quadratic time in shorter runs.
    """
    return any(_WHITESPACE.match(s, i) for i in range(0, len(s), _SAFE_WHITESPACE))


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
