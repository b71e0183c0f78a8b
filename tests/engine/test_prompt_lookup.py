"""Prompt lookup: equal to a search of the whole sequence."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from llama.engine.prompt_lookup import PromptLookup

SIZES = (4, 2)


def found_plainly(tokens: Sequence[int], most: int) -> tuple[list[int], int]:
    """What followed the last earlier occurrence, by a scan from the end."""
    for size in SIZES:
        end = list(tokens[-size:])
        for start in range(len(tokens) - size - 1, -1, -1):
            if list(tokens[start : start + size]) == end:
                copied = list(tokens)
                for i in range(most):  # it may go on into what was just copied
                    copied.append(copied[start + size + i])
                return copied[len(tokens) :], size
    return [], 0


@settings(max_examples=200, derandomize=True, database=None, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 2), min_size=1, max_size=40),
    steps=st.lists(st.integers(1, 9), max_size=12),
    most=st.integers(1, 15),
)
def test_a_growing_sequence_is_searched_as_if_anew(
    tokens: list[int], steps: list[int], most: int
) -> None:
    lookup, n = PromptLookup(SIZES), 1
    for step in [*steps, len(tokens)]:
        assert lookup.find(tokens[:n], most) == found_plainly(tokens[:n], most)
        n = min(len(tokens), n + step)


def test_it_prefers_a_longer_match_and_then_the_last() -> None:
    sizes = (3, 2)
    text = [1, 2, 3, 10, 7, 2, 3, 11, 8, 2, 3, 12, 9, 1, 2, 3]
    assert PromptLookup(sizes).find(text, 2) == ([10, 7], 3)
    assert PromptLookup(sizes).find([*text[:-3], 2, 3], 3) == ([12, 9, 2], 2)
    assert PromptLookup(sizes).find([1, 2, 3], 4) == ([], 0)
