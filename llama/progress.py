"""A progress bar on stderr for what takes over two seconds. Knows nothing about what it counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(
    items: Iterable[T], what: str, total: int | None = None, unit: str = ""
) -> Iterator[T]:
    """Iterate; from the third second on, show how far it is (if tqdm is installed)."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield from items
        return
    yield from tqdm(items, desc=what, total=total, unit=unit, delay=2)
