"""Progress on stderr of work that takes over two seconds. Knows nothing about the items."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from llama.common.printable import encodable, printable

T = TypeVar("T")
log = logging.getLogger("llama")
DELAY, INTERVAL = 2.0, 10.0  # seconds until a bar is shown; between the lines of a file


def progress(
    items: Iterable[T],
    what: str,
    total: int | None = None,
    unit: str = "",
    note: Callable[[], str] | None = None,
) -> Iterator[T]:
    """Yield the items and show how many are done: a bar in a terminal, else lines.

    The bar appears after two seconds and needs tqdm. A file or a pipe gets a line every ten
    seconds. Nothing is shown where the logger "llama" is set to show no warnings.

    Args:
        what: the text before the bar.
        total: number of items; None: unknown.
        unit: what an item is called, such as "tensor".
        note: called after each item; its text is shown after the bar.
    """
    if not log.isEnabledFor(logging.WARNING):
        yield from items
        return
    if sys.stderr is None or not sys.stderr.isatty():
        yield from _with_lines(items, what, total, unit, note)
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    with tqdm(items, desc=printable(what), total=total, unit=unit, delay=DELAY) as bar:
        for item in bar:
            yield item
            if note is not None:
                bar.set_postfix_str(note(), refresh=False)


def _with_lines(
    items: Iterable[T], what: str, total: int | None, unit: str, note: Callable[[], str] | None
) -> Iterator[T]:
    """Yield the items; write a line on stderr every `INTERVAL` seconds."""
    start = time.monotonic()
    due = start + INTERVAL
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now < due or sys.stderr is None:
            continue
        due = now + INTERVAL
        count = f"{done} of {total}" if total is not None else str(done)
        parts = [f"{count} {unit.strip()}".rstrip()]
        parts.append(f"{_clock(now - start)} elapsed")
        if total is not None:
            parts.append(f"{_clock((now - start) / done * (total - done))} left")
        if note is not None:
            parts.append(note())
        print(printable(f"{what}: {', '.join(parts)}"), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """ "1:05" for 65 seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(text: str) -> None:
    """Print lines on stdout without breaking a bar that is shown.

    Characters that would move a terminal's cursor, or that stdout cannot encode, are escaped.
    """
    text = encodable(printable(text), getattr(sys.stdout, "encoding", None))
    try:
        from tqdm import tqdm
    except ImportError:
        print(text, flush=True)
        return
    with tqdm.external_write_mode():
        print(text, flush=True)
