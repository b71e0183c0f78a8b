"""Token ids -> text as it comes: no character is split, and no part of a stop string gets out."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field

from llama.engine import FinishReason, Row
from llama.tokenizer import Tokenizer


@dataclass
class Piece:
    """A part of an answer.

    Attributes:
        text: may be empty while a character or a possible stop string is incomplete.
        tokens: the ids generated since the last piece.
        logprobs: of `tokens`, if they were asked for.
        finish_reason: "stop" or "length" in the last piece, None before.
    """

    text: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class RowText:
    """The text of one row of the engine. Ends the row when a stop string appears.

    Args:
        stop: the answer ends before the first of these texts.
    """

    def __init__(self, row: Row, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.row, self.tokenizer, self.stop = row, tokenizer, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""  # decoded, and may be the beginning of a stop string
        self.seen = 0  # ids of the row that went through the decoder

    def read(self) -> Piece:
        """What is new since the last call."""
        row = self.row
        new = row.ids[self.seen :]
        piece = Piece("", new, row.logprobs[self.seen :])
        self.seen = len(row.ids)
        last = row.finish_reason is not None
        self.held += self.decoder.decode(self.tokenizer.decode_bytes(new), final=last)
        found = [at for at in (self.held.find(text) for text in self.stop) if at >= 0]
        if found:
            piece.text, self.held = self.held[: min(found)], ""
            row.finish_reason = "stop"
        else:
            keep = 0 if last else max((_overlap(self.held, text) for text in self.stop), default=0)
            cut = len(self.held) - keep
            piece.text, self.held = self.held[:cut], self.held[cut:]
        piece.finish_reason = row.finish_reason
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` and is not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def check_stop(stop: Sequence[str]) -> Sequence[str]:
    """`stop`, if it is a list of non-empty texts."""
    if isinstance(stop, str) or not all(isinstance(text, str) for text in stop):
        raise TypeError(f"stop must be a list of texts, not {stop!r}")
    if "" in stop:
        raise ValueError("an empty stop text would end every answer at once; leave it out")
    return stop
