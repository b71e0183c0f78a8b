"""Rows as text, with what is trained marked. Knows nothing about files or models."""

from __future__ import annotations

import os
from collections.abc import Sequence

from llama.common.printable import printable
from llama.tokenizer import Tokenizer
from llama.train.rows import Row

_TRAINED = ("\x1b[32m", "\x1b[0m")  # green
_PLAIN = ("[[", "]]")


def show(rows: Sequence[Row], tokenizer: Tokenizer, n: int = 3, color: bool = False) -> str:
    """The first `n` rows, with what is trained marked. Control characters are shown as escapes.

    Args:
        color: mark it in green, unless NO_COLOR is set in the environment; otherwise by [[ ]].
    """
    begin, end = _TRAINED if color and not os.environ.get("NO_COLOR") else _PLAIN
    shown = []
    for number, row in enumerate(rows[:n], 1):
        parts = [f"Row {number}: {len(row.ids)} tokens, {int(row.trained.sum())} trained\n"]
        for ids, is_trained in _spans(row):
            text = printable(tokenizer.decode(ids))
            parts.append(f"{begin}{text}{end}" if is_trained else text)
        shown.append("".join(parts))
    return "\n\n".join(shown)


def _spans(row: Row) -> list[tuple[list[int], bool]]:
    """Consecutive ids that are trained, or are not."""
    spans: list[tuple[list[int], bool]] = []
    for token, is_trained in zip(row.ids.tolist(), row.trained.tolist(), strict=True):
        if not spans or spans[-1][1] != is_trained:
            spans.append(([], is_trained))
        spans[-1][0].append(token)
    return spans
