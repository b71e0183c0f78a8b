"""Reads an iterator that blocks from asyncio. Knows nothing about what it yields."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

Item_co = TypeVar("Item_co", covariant=True)
Item = TypeVar("Item")


class Closable(Protocol[Item_co]):
    """An iterator whose `close`, from any thread, makes a waiting `next` return."""

    def __next__(self) -> Item_co: ...

    def close(self) -> None: ...


async def read_in_thread(open_iterator: Callable[[], Closable[Item]]) -> AsyncGenerator[Item, None]:
    """What the iterator yields. A thread of its own opens it and waits for each item.

    The iterator is closed when this generator ends, or the task that awaits it is cancelled.
    """
    loop = asyncio.get_running_loop()
    # Not asyncio's own threads: they are few, and each iterator may wait for long.
    thread = ThreadPoolExecutor(1, "llama-stream")
    iterator: Closable[Item] | None = None
    try:
        iterator = await loop.run_in_executor(thread, open_iterator)
        while (item := await loop.run_in_executor(thread, _next_or_none, iterator)) is not None:
            yield item
    finally:
        if iterator is not None:
            iterator.close()
        thread.shutdown(wait=False)


def _next_or_none(iterator: Closable[Item]) -> Item | None:
    """A StopIteration cannot pass through a future."""
    try:
        return iterator.__next__()
    except StopIteration:
        return None
