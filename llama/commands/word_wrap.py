"""Breaks lines between words while text arrives in pieces. Knows no terminal."""

from __future__ import annotations

import re
import unicodedata


class WordWrap:
    """Text in pieces -> the same text with line ends where a word would not fit.

    A word is kept back until it is complete. One that is wider than a line is not broken: the
    terminal breaks it.

    Args:
        width: columns of the terminal.
    """

    def __init__(self, width: int):
        self.width, self.column, self.word = width, 0, ""

    def feed(self, text: str) -> str:
        """What can be printed after another piece."""
        *complete, self.word = re.split(r"(\s)", self.word + text)
        return "".join(map(self._place, complete))

    def end(self) -> str:
        """The last word. The next text begins on a new line."""
        last, self.word = self._place(self.word), ""
        self.column = 0
        return last

    def _place(self, part: str) -> str:
        """A word or one whitespace character, after a line end if it needs one."""
        if part == "\n":
            self.column = 0
            return part
        columns = columns_of(part)
        if part.isspace():  # one that would begin a line is dropped with the break
            if self.column + columns >= self.width:
                self.column = self.width
                return ""
            self.column += columns
            return part
        if not part:
            return ""
        broken = bool(self.column) and self.column + columns > self.width
        column = (0 if broken else self.column) + columns
        self.column = column if column <= self.width else column % self.width
        return "\n" * broken + part


def columns_of(text: str) -> int:
    """Columns of a terminal: 2 for a wide character, 0 for a combining one."""
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if character == "\t":
        return 8
    if unicodedata.combining(character) or character in "\u200b\u200d\ufe0f":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
