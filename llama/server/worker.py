"""One thread builds the model and makes the engine's steps; the event loop submits and reads.

Knows nothing about HTTP. All methods but the thread's own are called in the event loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from llama.common.daemon_thread import call_in_daemon
from llama.engine.request import Generation, Request
from llama.generation import Answer, Llama, Piece
from llama.server.ranks import BEAT, LeadingEngine, lead
from llama.text.detokenizer import Detokenizer

if TYPE_CHECKING:
    from llama.engine.engine import Engine

State = Literal["loading", "ready", "stopping", "dead"]


class UnavailableError(Exception):
    """The worker takes no requests: it loads, stops, or has failed."""


class Worker:
    """Runs requests on a model that a thread of its own builds.

    Args:
        open_llama: builds the model; called once, in the thread.
        max_queue: most requests that wait for a slot.

    Attributes:
        state: "dead" after an error of the thread, which is `error`.
        loaded: set when the model is built.
        ended: set when the thread makes no more steps.
        on_end: called with each ticket that has ended.
    """

    def __init__(self, open_llama: Callable[[], Llama], max_queue: int = 256):
        self.state: State = "loading"
        self.error: BaseException | None = None
        self.loaded, self.ended, self._idle = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.on_end: Callable[[Ticket], None] = lambda ticket: None
        self._open, self._max_queue = open_llama, max_queue
        self._llama: Llama | None = None
        self._engine: Engine | LeadingEngine | None = None
        self._work = threading.Condition()
        self._ending = False
        self._tickets: set[Ticket] = set()

    def start(self) -> None:
        """Begin to load."""
        self._loop = asyncio.get_running_loop()
        call_in_daemon(self._run)

    @property
    def llama(self) -> Llama:
        """The model.

        Raises:
            UnavailableError: it is not built yet, or has failed.
        """
        if self._llama is None or self.state == "dead":
            raise UnavailableError(self.reason)
        return self._llama

    @property
    def engine(self) -> Engine | LeadingEngine:
        """Takes requests and counts them; with several ranks, on all of them."""
        if self._engine is None:
            raise UnavailableError(self.reason)
        return self._engine

    @property
    def reason(self) -> str:
        """Why no request is taken."""
        return {
            "loading": "the model is loading; try again soon",
            "stopping": "the server is stopping; try again when it has started again",
            "dead": "the model has failed, and the server is ending; look into its log",
        }.get(self.state, "ready")

    @property
    def running(self) -> int:
        """Tickets that have not ended."""
        return len(self._tickets)

    def submit(
        self,
        groups: Sequence[Sequence[Request]],
        stop: Sequence[str],
        time_limit: float,
        *,
        whole: bool = False,
    ) -> Ticket:
        """Queue requests, all or none. Close the ticket when nobody reads it any more.

        Args:
            groups: the requests of a group have the same prompt, which is computed once.
            stop: texts before which an answer ends.
            time_limit: seconds after which answers end with the reason "timeout".
            whole: nothing is to be read before all answers have ended.

        Raises:
            UnavailableError: see `state`.
            QueueFull: too many wait already.
            TypeError, ValueError: a request cannot be run.
        """
        if self.state != "ready":
            raise UnavailableError(self.reason)
        llama, engine = self.llama, self.engine
        ticket = Ticket(self, time_limit, whole)
        try:
            for group in groups:
                generations = [Generation(request) for request in group]
                engine.queue_siblings(generations)
                for generation in generations:
                    detokenizer = Detokenizer(llama.tokenizer.decode_bytes, stop)
                    ticket.add(Answer(engine, generation, detokenizer))
        except BaseException:
            ticket.close()
            raise
        self._tickets.add(ticket)
        self._idle.clear()
        with self._work:
            self._work.notify()
        return ticket

    def refuse(self) -> None:
        """Take no more requests."""
        if self.state in ("loading", "ready"):
            self.state = "stopping"

    async def wait_until_idle(self, seconds: float) -> None:
        """Wait until no ticket runs, at most this long."""
        if self._tickets:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._idle.wait(), seconds)

    def cancel_all(self) -> None:
        """End all answers."""
        for ticket in list(self._tickets):
            ticket.fail(UnavailableError(self.reason))

    def end(self) -> None:
        """Let the thread end after its step; with several ranks, theirs too."""
        self.refuse()
        with self._work:
            self._ending = True
            self._work.notify()

    def _run(self) -> None:
        """The thread."""
        try:
            llama = self._open()
            self._engine = lead(llama.engine, self._max_queue)
            self._post(self._loaded, llama)
            while self._wait_for_work():
                self._engine.step()
                self._post(self._deliver)
            if isinstance(self._engine, LeadingEngine):
                self._engine.end()
            self._post(self.ended.set)
        except BaseException as e:
            self._post(self._fail, e)

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to compute; False: end."""
        engine = self.engine
        beat = BEAT if isinstance(engine, LeadingEngine) else None
        with self._work:
            self._work.wait_for(lambda: self._ending or engine.busy, beat)
            return not self._ending

    def _post(self, function: Callable[..., object], *values: object) -> None:
        with suppress(RuntimeError):  # the loop has ended: the process is about to
            self._loop.call_soon_threadsafe(function, *values)

    def _loaded(self, llama: Llama) -> None:
        self._llama = llama
        if self.state == "loading":
            self.state = "ready"
        self.loaded.set()

    def _deliver(self) -> None:
        """Read what a step has produced. Readers get it when they ask."""
        for ticket in list(self._tickets):
            ticket.read()

    def _fail(self, error: BaseException) -> None:
        """The thread has ended by an error: so do all answers."""
        self.error, self.state = error, "dead"
        for ticket in list(self._tickets):
            ticket.fail(UnavailableError(self.reason))
        self.ended.set()

    def forget(self, ticket: Ticket) -> None:
        """Deliver no more to a ticket."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            self.on_end(ticket)
        if not self._tickets:
            self._idle.set()


class Ticket:
    """The answers to what was submitted together. `batches` has their pieces.

    Pieces that arrive before a reader asks are merged: a slow reader gets fewer and longer ones.

    Attributes:
        answers: in the order of the requests.
    """

    def __init__(self, worker: Worker, time_limit: float, whole: bool = False):
        self.answers: list[Answer] = []
        self._worker, self._whole = worker, whole
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
                self._pieces[index] = merge(self._pieces.get(index), piece)
        if self._pieces and not (self._whole and self._unended):
            self._news.set()
        if not self._unended:
            self._timer.cancel()
            self._worker.forget(self)

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
        self._worker.forget(self)
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


def merge(first: Piece | None, second: Piece) -> Piece:
    """Two pieces in a row as one."""
    if first is None:
        return second
    return Piece(
        first.text + second.text,
        first.tokens + second.tokens,
        first.logprobs + second.logprobs,
        second.finish_reason,
    )
