"""A progress bar on stderr for work that takes over two seconds. Knows nothing about the items."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger("llama")


def progress(
    items: Iterable[T],
    what: str,
    total: int | None = None,
    unit: str = "",
    note: Callable[[], str] | None = None,
) -> Iterator[T]:
    """Yield the items; after two seconds show how many are done.

    No bar is shown without tqdm, or where the logger "llama" is set to show no warnings.

    Args:
        what: the text before the bar.
        total: number of items; None: unknown.
        unit: what an item is called, such as "tensor".
        note: called after each item; its text is shown after the bar.
    """
    if not log.isEnabledFor(logging.WARNING):
        yield from items
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    with tqdm(items, desc=what, total=total, unit=unit, delay=2) as bar:
        for item in bar:
            yield item
            if note is not None:
                bar.set_postfix_str(note(), refresh=False)


def say(text: str) -> None:
    """Print a line on stdout without breaking a bar that is shown."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(text, flush=True)
        return
    with tqdm.external_write_mode():
        print(text, flush=True)
