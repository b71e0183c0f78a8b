"""One thread builds the model and makes the engine's steps; the event loop submits and reads.

Knows nothing about HTTP. All methods but the thread's own are called in the event loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Literal, cast

from llama.common.daemon_thread import call_in_daemon
from llama.engine.engine import Engine
from llama.engine.request import Generation, Request
from llama.generation import Answer, Llama
from llama.server.ranks import BEAT, LeadingEngine, lead
from llama.server.ticket import Ticket
from llama.text.detokenizer import Detokenizer

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
        wanted, places = sum(map(len, groups)), llama.model.params.max_batch_size + self._max_queue
        if wanted > places:
            raise ValueError(
                f"{wanted} answers were asked for, and only {places} may run and wait; ask for "
                "fewer at once, or start the server with a larger --max_queue"
            )
        ticket = Ticket(time_limit, whole, self._forget)
        try:
            for group in groups:
                generations = [Generation(request) for request in group]
                engine.queue_siblings(generations)
                for generation in generations:
                    detokenizer = Detokenizer(llama.tokenizer.decode_bytes, stop)
                    ticket.add(Answer(cast(Engine, engine), generation, detokenizer))
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

    def _forget(self, ticket: Ticket) -> None:
        """Deliver no more to a ticket."""
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            self.on_end(ticket)
        if not self._tickets:
            self._idle.set()
