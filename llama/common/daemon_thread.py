"""Calls a function in a thread that does not keep the process from ending."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def call_in_daemon(function: Callable[[], Result]) -> Future[Result]:
    """Start a call; the future gets its result or its error.

    Signal handlers run in the main thread, so a function of another language delays them there and
    not here. Python waits at exit for the threads of an executor, but not for this one.
    """
    future: Future[Result] = Future()

    def call() -> None:
        try:
            future.set_result(function())
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=call, daemon=True).start()
    return future
