"""A progress bar on stderr for what takes over two seconds. Knows nothing about what it counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(
    items: Iterable[T],
    what: str,
    total: int | None = None,
    unit: str = "",
    note: Callable[[], str] | None = None,
) -> Iterator[T]:
    """Iterate; from the third second on, show how far it is (if tqdm is installed).

    Args:
        note: what to show beside it, asked for after each item.
    """
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
    """Print a line on stdout, above a bar that is shown."""
    try:
        from tqdm import tqdm
    except ImportError:
        print(text, flush=True)
        return
    with tqdm.external_write_mode():
        print(text, flush=True)
