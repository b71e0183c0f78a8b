"""Prompt lookup: proposes what followed the same ids earlier in a row. Knows no model.

The method is that of assisted generation by n-grams of the prompt: rewritten text, edited code and
quotes repeat long parts of what they come from.
"""

from __future__ import annotations

from collections.abc import Sequence

# Lengths of the n-grams that are looked up, the longest first.
SIZES = (6, 3, 2)


class PromptLookup:
    """Where each n-gram of a growing sequence of ids occurred last.

    A call of `find` adds what is new, so that a step costs the same however long the sequence is.
    """

    def __init__(self, sizes: Sequence[int] = SIZES):
        self.sizes = sizes
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in sizes]
        self._known = 0  # n-grams that end before this index are in `_after`

    def find(self, tokens: Sequence[int], most: int) -> tuple[list[int], int]:
        """What followed the last occurrence of the ids at the end of `tokens`.

        Args:
            tokens: the same as in the last call, and others after them.
            most: how many ids to return. They may go on into themselves, where the text repeats.

        Returns:
            (ids, length of the n-gram that was found); ([], 0) if none was.
        """
        self._add(tokens)
        for size, after in zip(self.sizes, self._after, strict=True):
            start = after.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if start is not None:
                found = list(tokens[start : start + most])
                while len(found) < most:
                    found.append(found[len(found) - (len(tokens) - start)])
                return found, size
        return [], 0

    def _add(self, tokens: Sequence[int]) -> None:
        """Add n-grams up to the last one that something follows."""
        for end in range(max(self._known, 1), len(tokens)):
            for size, after in zip(self.sizes, self._after, strict=True):
                if end >= size:
                    after[tuple(tokens[end - size : end])] = end
            self._known = end + 1
