"""Work that would hold up the event loop: reading long texts, compiling schemas. Knows no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from llama.common.daemon_thread import call_in_daemon

Result = TypeVar("Result")


class Threads:
    """Runs functions in threads, a few at once, which do not keep the process from ending.

    Args:
        most: functions at once. One whose caller has given up still counts until it returns.
    """

    def __init__(self, most: int = 4):
        self._free = asyncio.Semaphore(most)

    async def run(self, function: Callable[[], Result], seconds: float | None) -> Result:
        """The result of a function.

        Raises:
            asyncio.TimeoutError: there was none within so many seconds; never where they are None.
            Exception: that of the function.
        """
        return await asyncio.wait_for(self._run(function), seconds)

    async def _run(self, function: Callable[[], Result]) -> Result:
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def end() -> None:
            self._free.release()
            done.set()

        def post(_: object) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(end)

        await self._free.acquire()
        try:
            future = call_in_daemon(function)
        except BaseException:  # the system gives no more threads
            self._free.release()
            raise
        future.add_done_callback(post)
        await done.wait()
        return future.result()
