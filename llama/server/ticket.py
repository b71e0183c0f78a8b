"""The answers to one request of a client, from the worker's thread to the client's task.

Knows nothing about HTTP. All methods are called in the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from llama.generation import Answer, Piece


class Ticket:
    """The answers to what was submitted together. `batches` has their pieces.

    Pieces that arrive before a reader asks are merged: a slow reader gets fewer and longer ones.

    Attributes:
        answers: in the order of the requests.
    """

    def __init__(self, time_limit: float, whole: bool, on_end: Callable[[Ticket], None]):
        self.answers: list[Answer] = []
        self._whole, self._on_end = whole, on_end
        self._pieces: dict[int, Piece] = {}  # unread, by index
        self._unended: set[int] = set()
        self._news = asyncio.Event()
        self._error: Exception | None = None
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(time_limit, self._expire)

    def add(self, answer: Answer) -> None:
        self._unended.add(len(self.answers))
        self.answers.append(answer)

    def read(self) -> None:
        """Take what the answers have. Ends those in which a stop string was found."""
        for index in list(self._unended):
            answer = self.answers[index]
            if not answer.unread:
                continue
            piece = answer.read()
            if answer.finish_reason is not None:
                self._unended.discard(index)
            if answer.error is not None:
                self.fail(answer.error)
                return
            if piece is not None and (piece.tokens or piece.finish_reason):
                self._add(index, piece)
        if self._pieces and not (self._whole and self._unended):
            self._news.set()
        if not self._unended:
            self._timer.cancel()
            self._on_end(self)

    def _add(self, index: int, piece: Piece) -> None:
        """Append to what is unread, in place: an answer has thousands of pieces."""
        unread = self._pieces.setdefault(index, piece)
        if unread is piece:
            return
        unread.text += piece.text
        unread.tokens += piece.tokens
        unread.logprobs += piece.logprobs
        unread.top_logprobs += piece.top_logprobs
        unread.finish_reason = piece.finish_reason

    def fail(self, error: Exception) -> None:
        """End all answers; the reader gets the error."""
        self._error = error
        self.cancel()

    def cancel(self) -> None:
        """End all answers, and free their slots when the current step ends."""
        self._timer.cancel()
        for answer in self.answers:
            answer.end()
        self._unended.clear()
        self._on_end(self)
        self._news.set()

    close = cancel

    def _expire(self) -> None:
        for index in self._unended:
            self.answers[index].end("timeout")
        self.read()

    async def batches(self, beat: float | None = None) -> AsyncIterator[list[tuple[int, Piece]]]:
        """(index, piece) of what is new, as soon as there is something, until all have ended.

        Args:
            beat: seconds after which an empty batch comes.

        Raises:
            Exception: an answer failed.
        """
        while self._unended or self._pieces or self._error:
            timer = beat and self._loop.call_later(beat, self._news.set)
            try:
                await self._news.wait()
            finally:
                if timer:
                    timer.cancel()
            self._news.clear()
            pieces, self._pieces = self._pieces, {}
            if pieces or not self._error:
                yield list(pieces.items())
            if self._error is not None:
                raise self._error
