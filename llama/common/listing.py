"""Long lists in messages."""

from __future__ import annotations

from collections.abc import Sequence


def listing(items: Sequence[str], limit: int = 8) -> str:
    """The first `limit` items, and how many more there are: "a, b and 7 more"."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
