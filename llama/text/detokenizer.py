"""Ids -> text as they come. Never yields part of a character, nor part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence


class Detokenizer:
    """The text of one answer, id by id.

    Args:
        decode_bytes: of a tokenizer.
        stop: the text ends before the first of these stop strings.

    Attributes:
        used: how many ids have been fed, including those of a stop string.
        stopped: a stop string has appeared; ids after it are ignored.
    """

    def __init__(self, decode_bytes: Callable[[Sequence[int]], bytes], stop: Sequence[str] = ()):
        self.decode_bytes, self.stop = decode_bytes, check_stop(stop)
        self.used, self.stopped = 0, False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # decoded text that may be the beginning of a stop string

    def feed(self, ids: Sequence[int], last: bool = False) -> str:
        """The text that is certain after these ids.

        Args:
            last: no more ids will come, so nothing is held back.
        """
        text = ""
        for i in ids:
            if not self.stopped:
                self._held += self._utf8.decode(self.decode_bytes([i]))
                self.used += 1
                text += self._release()
        if last and not self.stopped:
            self._held += self._utf8.decode(b"", final=True)
            text += self._release()
            text, self._held = text + self._held, ""
        return text

    def _release(self) -> str:
        """The held text up to a stop string, or up to what may be the beginning of one."""
        found = [at for at in (self._held.find(text) for text in self.stop) if at >= 0]
        if found:
            self.stopped = True
            cut = min(found)
        else:
            cut = len(self._held) - max((overlap(self._held, s) for s in self.stop), default=0)
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop` but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def check_stop(stop: Sequence[str]) -> Sequence[str]:
    """`stop`, if it is a list of non-empty texts.

    Raises:
        TypeError, ValueError: it is not.
    """
    is_list = isinstance(stop, Collection) and not isinstance(stop, str)
    if not is_list or not all(isinstance(text, str) for text in stop):
        raise TypeError(f"stop must be a list of texts, not {stop!r}")
    if "" in stop:
        raise ValueError("an empty stop text would end every answer at once; leave it out")
    return stop
