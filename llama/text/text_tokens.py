"""Tokens that text stands for, such as `<think>`: found in a text before it is split into pieces.

Finds them as the `tokenizers` library finds added tokens, the leftmost and longest first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

_WORD = re.compile(r"\w")


class TextTokens:
    """Finds given texts in a text.

    Args:
        flags: {text of the token: its flags}. "lstrip" and "rstrip": whitespace before and after
            it is part of it. "single_word": it is not found beside a letter, a digit or `_`.
    """

    def __init__(self, flags: Mapping[str, Collection[str]]):
        self.flags = dict(flags)
        longest_first = sorted(flags, key=len, reverse=True)
        self._pattern = re.compile("|".join(re.escape(text) for text in longest_first) or "(?!)")

    def split(self, s: str) -> Iterator[tuple[str, bool]]:
        """(part of `s`, False) and (text of a token, True), in order."""
        end = 0
        for match in self._pattern.finditer(s) if self.flags else ():
            token, start, stop = match.group(), match.start(), match.end()
            flags = self.flags[token]
            beside = s[start - 1 : start] + s[stop : stop + 1]
            if "single_word" in flags and _WORD.search(beside):
                continue
            if "lstrip" in flags:
                start = _before_space(s, end, start)
            if "rstrip" in flags:
                stop = _after_space(s, stop)
            if start > end:
                yield s[end:start], False
            yield token, True
            end = stop
        if end < len(s):
            yield s[end:], False


def strip_beside_tokens(
    pieces: Sequence[tuple[str, bool]], flags: Mapping[str, Collection[str]]
) -> list[tuple[str, bool]]:
    """`pieces` (text, whether it is a token) without the whitespace that is part of a token.

    Args:
        flags: {text of a token: its flags}, "lstrip" and "rstrip" as in `TextTokens`.

    Raises:
        ValueError: a token is "single_word", which is not supported here.
    """
    for text, is_token in pieces:
        if is_token and "single_word" in flags.get(text, ()):
            raise ValueError(
                f"the special token {text!r} is not found beside letters (single_word), which chat "
                "prompts do not support; use text completion"
            )
    found: list[tuple[str, bool]] = []
    for i, (text, is_token) in enumerate(pieces):
        start, stop = 0, len(text)
        if not is_token and i > 0 and pieces[i - 1][1]:
            start = _after_space(text, 0) if "rstrip" in flags.get(pieces[i - 1][0], ()) else 0
        if not is_token and i + 1 < len(pieces) and pieces[i + 1][1]:
            after = flags.get(pieces[i + 1][0], ())
            stop = _before_space(text, start, stop) if "lstrip" in after else stop
        if start < stop:
            found.append((text[start:stop], is_token))
    return found


def _before_space(s: str, start: int, stop: int) -> int:
    """Where the whitespace before `stop` begins, but not before `start`."""
    while stop > start and _is_space(s[stop - 1]):
        stop -= 1
    return stop


def _after_space(s: str, start: int) -> int:
    """Where the whitespace from `start` on ends."""
    while start < len(s) and _is_space(s[start]):
        start += 1
    return start


def _is_space(character: str) -> bool:
    """Whether Unicode calls it White_Space; Python counts four separators of ASCII too."""
    return character.isspace() and not "\x1c" <= character <= "\x1f"
