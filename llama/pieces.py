"""Ids -> text as they come: no character is split, and no part of a stop string gets out."""

from __future__ import annotations

import codecs
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from llama.engine.engine import Engine
from llama.engine.request import FinishReason, Request
from llama.tokenizer import Tokenizer


@dataclass
class Piece:
    """A part of an answer.

    Attributes:
        text: may be empty while a character or a possible stop string is incomplete.
        tokens: the ids generated since the last piece.
        logprobs: of `tokens`, if they were asked for.
        finish_reason: "stop", "length" or "cancelled" in the last piece, None before.
    """

    text: str
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Reader:
    """The text of a request: watches it, and ends it when a stop string appears.

    Args:
        stop: the answer ends before the first of these texts.

    Attributes:
        pieces: what nobody has taken yet.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.request, self.tokenizer, self.stop = request, tokenizer, check_stop(stop)
        self.pieces: deque[Piece] = deque()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""  # decoded, and may be the beginning of a stop string
        self.seen = 0  # generated ids that went through the decoder
        request.watch = self.read

    def read(self) -> None:
        """Make a piece of what is new."""
        request = self.request
        if request.error is not None:  # which is raised, after what came before it
            return
        new = request.tokens[len(request.prompt) + self.seen :]
        piece = Piece("", new, request.generated_logprobs[self.seen :])
        self.seen += len(new)
        last = request.finish_reason is not None
        self.held += self.decoder.decode(self.tokenizer.decode_bytes(new), final=last)
        found = [at for at in (self.held.find(text) for text in self.stop) if at >= 0]
        if found:
            piece.text, self.held = self.held[: min(found)], ""
            request.finish_reason = "stop"
        else:
            keep = 0 if last else max((_overlap(self.held, text) for text in self.stop), default=0)
            cut = len(self.held) - keep
            piece.text, self.held = self.held[:cut], self.held[cut:]
        piece.finish_reason = request.finish_reason
        self.pieces.append(piece)

    def text(self) -> str:
        """The text of all pieces that nobody has taken."""
        return "".join(piece.text for piece in self.pieces)


class Stream:
    """An iterator over the pieces of one answer, which is generated as it is read.

    Streams of one `Llama` may run at the same time, in one thread or in several: each step of the
    engine advances all that have begun. `close` (from any thread), the end of a `with` block, or
    no longer being referred to ends the generation.

    Attributes:
        request: what was asked; `request.reused` tells how much of the prompt was cached.
    """

    def __init__(self, engine: Engine, request: Request, reader: Reader):
        self._ended = True  # until it is known that it can run
        engine.check(request)
        self.request, self._engine, self._reader = request, engine, reader
        self._begin = threading.Lock()
        self._ended = False

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        request, pieces = self.request, self._reader.pieces
        with self._begin:
            if not request.id and not self._ended:
                self._engine.add(request)
        try:
            while not self._ended:
                self._engine.wait(lambda: pieces or request.finish_reason or self._ended)
                try:
                    piece = pieces.popleft()
                except IndexError:  # cancelled, failed, or another thread has taken it
                    if request.finish_reason is None:
                        continue
                    self._ended = True
                    if request.error is not None:
                        raise request.error from None
                    return Piece("", finish_reason=request.finish_reason)
                self._ended = piece.finish_reason is not None
                return piece
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Free the slot at once."""
        if not self._ended:
            self._ended = True
            if self.request.id:
                self._engine.cancel(self.request.id)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` and is not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def check_stop(stop: Sequence[str]) -> Sequence[str]:
    """`stop`, if it is a list of non-empty texts."""
    is_list = isinstance(stop, Collection) and not isinstance(stop, str)
    if not is_list or not all(isinstance(text, str) for text in stop):
        raise TypeError(f"stop must be a list of texts, not {stop!r}")
    if "" in stop:
        raise ValueError("an empty stop text would end every answer at once; leave it out")
    return stop
