"""`Split` of data.py: batches and windows against plain Python code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.train.data import Split


def numbered(lengths: list[int]) -> Split:
    """A split with documents of these lengths; its ids are 0, 1, 2, ..."""
    starts = np.cumsum([0, *lengths])[:-1]
    return Split("train", np.arange(sum(lengths), dtype=np.uint16), starts)


def test_batch_rows_are_windows_of_the_text() -> None:
    split = numbered([5000])
    x, y = split.batch(step=3, batch_size=7, context=20)
    assert x.shape == y.shape == (7, 20) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x, x[:, :1] + torch.arange(20)) and torch.equal(y, x + 1)


def test_batch_depends_on_seed_and_step_alone() -> None:
    first, again = numbered([5000]), numbered([5000])
    steps = {step: first.batch(step, 4, 16, seed=1) for step in range(10)}
    for step in (7, 2, 9):  # in any order
        assert all(map(torch.equal, again.batch(step, 4, 16, seed=1), steps[step]))
    starts = {tuple(x[:, 0].tolist()) for x, _ in steps.values()}
    others = {tuple(first.batch(step, 4, 16, seed=2)[0][:, 0].tolist()) for step in range(10)}
    assert len(starts | others) == 20


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_parts_are_one_batch(n: int) -> None:
    split = numbered([300, 40, 20, 4000, 7])
    whole = split.batch(5, 24, 10, seed=3)
    parts = [split.batch(5, 24 // n, 10, seed=3, part=i, parts=n) for i in range(n)]
    for expected, got in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(expected, torch.cat(got))


def test_windows_are_drawn_uniformly() -> None:
    split = numbered([90, 33, 5, 5, 200])
    context = 4  # 8 contexts are 32 ids: both documents of 5 join the last one
    allowed = [*range(90 - 4), *range(90, 123 - 4), *range(123, 333 - 4)]
    x, _ = split.batch(0, 100_000, context)
    counts = torch.bincount(x[:, 0], minlength=333)
    assert counts.nonzero().flatten().tolist() == allowed
    mean = 100_000 / len(allowed)
    assert (counts[allowed] - mean).abs().max() < 6 * mean**0.5


def spans(lengths: list[int], least: int) -> list[list[int]]:
    """Ids of the spans: short documents are joined with the next, the last with the previous."""
    out: list[list[int]] = []
    at = 0
    for n in lengths:
        ids = list(range(at, at + n))
        at += n
        if out and len(out[-1]) < least:
            out[-1] += ids
        else:
            out.append(ids)
    if len(out) > 1 and len(out[-1]) < least:
        out[-2:] = [out[-2] + out[-1]]
    return out


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 60), max_size=12), st.integers(1, 9), st.integers(1, 5), st.integers()
)
def test_windows_cover_each_span_once(
    lengths: list[int], context: int, batch_size: int, step: int
) -> None:
    split = numbered(lengths)
    expected = []
    for span in spans(lengths, 8 * context):
        for i in range(0, len(span) - 1, context):
            expected.append(span[i : i + context + 1])
    got, sizes = [], []
    for x, y in split.windows(context, batch_size):
        assert x.shape == y.shape and len(x) <= batch_size and x.dtype == torch.int64
        sizes.append(len(x))
        got += [[*a, b[-1]] for a, b in zip(x.tolist(), y.tolist(), strict=True)]
        assert torch.equal(x[:, 1:], y[:, :-1])
    assert got == expected
    for most in (1, 3, 7):
        few = list(split.windows(context, batch_size, most))
        some = [[*a, b[-1]] for x, y in few for a, b in zip(x.tolist(), y.tolist(), strict=True)]
        assert some == expected[:: -(-len(expected) // most) or 1] and len(some) <= most
    if split.ids.size > context:
        inside = {
            tuple(s[i : i + context]) for s in spans(lengths, 8 * context) for i in range(999)
        }
        x, _ = split.batch(abs(step), 20, context)
        assert {tuple(row) for row in x.tolist()} <= inside
