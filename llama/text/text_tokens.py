"""Tokens that text stands for, such as `<think>`: found in a text before it is split into pieces.

Finds them as the `tokenizers` library finds added tokens, the leftmost and longest first.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

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
                while start > end and _is_space(s[start - 1]):
                    start -= 1
            if "rstrip" in flags:
                while stop < len(s) and _is_space(s[stop]):
                    stop += 1
            if start > end:
                yield s[end:start], False
            yield token, True
            end = stop
        if end < len(s):
            yield s[end:], False


def _is_space(character: str) -> bool:
    """Whether Unicode calls it White_Space; Python counts four separators of ASCII too."""
    return character.isspace() and not "\x1c" <= character <= "\x1f"
