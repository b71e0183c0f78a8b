"""Which samples share a row. Knows only lengths."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Fill bins of `capacity`: the longest item first, each into the first bin with room for it.

    Takes n log n steps: a binary tree over the bins knows the most room of each of its halves.

    Returns:
        For each bin, the indices of its items.

    Raises:
        ValueError: an item is longer than a bin.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"{max(lengths)} tokens do not fit into a row of {capacity}")
    leaves = 1
    while leaves < len(lengths):
        leaves *= 2
    most_room = [capacity] * (2 * leaves)  # of node i; its halves are 2 i and 2 i + 1
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length, node = lengths[item], 1
        while node < leaves:
            node = 2 * node if most_room[2 * node] >= length else 2 * node + 1
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(item)
        most_room[node] -= length
        while node > 1:
            node //= 2
            most_room[node] = max(most_room[2 * node], most_room[2 * node + 1])
    return bins
