"""Exceptions that end a job of several processes, and errors that are kept. Imports no torch."""

from __future__ import annotations

from typing import NoReturn


class RankError(Exception):
    """A failure of one rank, raised on every rank: the job is over."""


class QueueFull(RuntimeError):  # noqa: N818 - as asyncio.QueueFull
    """The engine's queue is full: try again when other requests have ended."""


class GrammarError(ValueError):
    """An answer cannot go on: its grammar allows nothing more, or has become too complex."""


class Terminated(SystemExit):
    """SIGTERM arrived: torchrun sends it to the remaining ranks when one has ended."""


def without_frames(error: Exception) -> Exception:
    """Remove the tracebacks of an error that is kept, and of its causes.

    Their frames would keep a model and its cache in memory.
    """
    chain: list[BaseException] = [error]
    for link in chain:
        link.__traceback__ = None
        causes = (link.__cause__, link.__context__)
        chain += [e for e in causes if e is not None and not any(e is other for other in chain)]
    return error


def refuse_copies(self: object, _protocol: object) -> NoReturn:
    """The `__reduce_ex__` of what threads share: copy, deepcopy and pickle call it."""
    name = type(self).__name__
    raise TypeError(
        f"a {name} cannot be copied, pickled or sent to another process: threads can share this "
        "one, and a new process calls Llama.build itself"
    )
