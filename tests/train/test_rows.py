"""Cutting, dropping, packing and batches of rows, by plain arithmetic."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.tokenizer import Tokenizer
from llama.train.batch import IGNORED, Batch
from llama.train.packing import first_fit_decreasing
from llama.train.rows import Row, Rows
from llama.train.untrained_tokens import untrained_tokens, untrained_warning
from tests.chat_models import vocabulary


def row(prompt: int, answer: int, first: int = 0) -> Row:
    """A row of ascending ids; the last `answer` ones are trained."""
    ids = np.arange(first, first + prompt + answer, dtype=np.int32)
    return Row(ids, np.arange(prompt + answer) >= prompt)


def many(n: int, seed: int = 0, longest: int = 30) -> list[Row]:
    """Rows whose ids are used once in all of them."""
    rng, first, rows = random.Random(seed), 1, []
    for _ in range(n):
        rows.append(row(rng.randint(1, longest // 2), rng.randint(1, longest // 2), first))
        first += len(rows[-1].ids)
    return rows


def samples(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """(tokens, targets) of each sample, without padding."""
    if batch.lengths is not None:
        assert batch.tokens.shape[0] == 1 and sum(batch.lengths) == batch.tokens.shape[1]
        parts = (batch.tokens[0].split(batch.lengths), batch.targets[0].split(batch.lengths))
    else:
        parts = (batch.tokens, batch.targets)
    found = []
    for tokens, targets in zip(*parts, strict=True):
        end = int((targets != IGNORED).nonzero().max()) + 1  # a row ends with a target
        assert batch.lengths is None or end == len(tokens)
        found.append((tokens[:end].tolist(), targets[:end].tolist()))
    return found


def expected(rows: list[Row]) -> list[tuple[list[int], list[int]]]:
    return sorted(
        (r.ids[:-1].tolist(), np.where(r.trained, r.ids, IGNORED)[1:].tolist()) for r in rows
    )


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40), batch=st.integers(1, 4), accumulate=st.integers(1, 3),
    ranks=st.integers(1, 3), pack=st.booleans(), epoch=st.integers(0, 2),
)  # fmt: skip
def test_an_epoch_has_every_row_once(
    n: int, batch: int, accumulate: int, ranks: int, pack: bool, epoch: int
) -> None:
    rows = many(n, seed=n)
    data = Rows(rows, max_seq_len=32, batch_size=batch, accumulate=accumulate, pack=pack)
    steps, seen = data.steps_per_epoch(ranks), []
    assert steps == -(-len(data) // (batch * accumulate * ranks))
    sizes = []
    for step in range(epoch * steps, (epoch + 1) * steps):
        parts = [data.batches(step, rank, ranks) for rank in range(ranks)]
        assert len({len(part) for part in parts}) == 1  # as many micro-batches on every rank
        assert 1 <= len(parts[0]) <= accumulate
        batches = [b for part in parts for b in part]
        assert all(b.tokens.shape == b.targets.shape for b in batches)
        assert sum(b.target_count for b in batches) == data.target_count(step, ranks)
        found = [sample for b in batches if b.target_count for sample in samples(b)]
        sizes.append(len(found))
        seen += found
        again = [b.tokens.tolist() for b in data.batches(step, 0, ranks)]
        assert again == [b.tokens.tolist() for b in parts[0]]
    assert sorted(seen) == expected(rows)
    assert pack or max(sizes) - min(sizes) <= 1


def test_an_update_is_the_same_rows_however_it_is_divided() -> None:
    rows = many(37)
    for pack in (False, True):
        found = []
        for batch, accumulate, ranks in [(8, 1, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2)]:
            data = Rows(rows, max_seq_len=32, batch_size=batch, accumulate=accumulate, pack=pack)
            found.append(
                [
                    sorted(
                        sample
                        for rank in range(ranks)
                        for b in data.batches(step, rank, ranks)
                        for sample in samples(b)
                    )
                    for step in range(9)
                ]
            )
        assert all(one == found[0] for one in found)


def test_order_depends_on_seed_and_epoch_and_the_longest_come_first() -> None:
    rows = many(50)

    def order(seed: int, epoch: int) -> list[int]:
        data = Rows(rows, max_seq_len=32, batch_size=1, seed=seed)
        return [int(data.batches(epoch * 50 + k)[0].tokens[0, 0]) for k in range(50)]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in range(2) for epoch in range(2)}) == 4
    longest = max(len(r.ids) for r in rows)
    for pack in (False, True):
        data = Rows(rows, max_seq_len=32, batch_size=4, accumulate=2, pack=pack)
        widths = [b.tokens.numel() for step in range(20) for b in data.batches(step)]
        assert widths[0] == max(widths)
        assert pack or data.batches(0)[0].tokens.shape == (4, longest - 1)
        assert pack or data.batches(data.steps_per_epoch())[0].tokens.shape != (4, longest - 1)


def test_rows_are_cut_after_an_answer_has_begun_or_dropped() -> None:
    rows = [row(5, 4), row(8, 6), row(10, 6), row(11, 3), row(30, 1)]
    turns = Row(np.arange(16, dtype=np.int32), np.arange(16) % 8 == 3)  # trained: 3 and 11
    data = Rows([*rows, turns], max_seq_len=10, batch_size=2, pad_id=99)
    assert [len(r.ids) for r in data.rows] == [9, 11, 11, 4]  # the last ends with its last target
    assert (data.cut, data.dropped, data.tokens, data.targets) == (3, 2, 35, 4 + 3 + 1 + 1)
    [one] = Rows([turns, row(1, 2)], max_seq_len=20, batch_size=2, pad_id=99).batches(0)
    assert one.tokens.tolist() == [list(range(11)), [0, 1] + [99] * 9]
    assert one.targets.tolist()[1] == [1, 2] + [IGNORED] * 9
    with pytest.raises(ValueError, match=r"no row is left of 1: .* a larger --max_seq_len"):
        Rows([row(30, 1)], max_seq_len=10, batch_size=1)
    with pytest.raises(ValueError, match="no row is left of 0"):
        Rows([], max_seq_len=10, batch_size=1)


def test_packed_rows() -> None:
    rows = [row(1, length, 100 * i) for i, length in enumerate([7, 3, 5, 4, 1])]
    data = Rows(rows, max_seq_len=10, batch_size=2, pack=True)
    [batch] = data.batches(0)
    assert len(data) == 2 and batch.lengths == (7, 3, 5, 4, 1)
    assert batch.tokens[0, 7:10].tolist() == [100, 101, 102]
    assert batch.targets[0, 6:10].tolist() == [7, 101, 102, 103]
    [first, second] = Rows(rows, max_seq_len=10, batch_size=1, accumulate=2, pack=True).batches(0)
    assert first.tokens.shape == second.tokens.shape == (1, 10)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_first_fit_decreasing_equals_the_plain_search(lengths: list[int]) -> None:
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for each in bins:
            if sum(lengths[i] for i in each) + lengths[item] <= 20:
                each.append(item)
                break
        else:
            bins.append([item])
    assert first_fit_decreasing(lengths, 20) == bins


def test_first_fit_of_100_000_rows_and_of_one_too_long() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5, 0.7, 100_000).astype(int) + 1, 2048).tolist()
    bins = first_fit_decreasing(lengths, 2048)  # the plain search takes many minutes
    assert sum(lengths) / (len(bins) * 2048) > 0.98
    with pytest.raises(ValueError, match="21 tokens do not fit"):
        first_fit_decreasing([21], 20)


@pytest.mark.parametrize("pack", [False, True])
def test_evaluation_has_every_row_once(pack: bool) -> None:
    rows = many(23)
    data = Rows(rows, max_seq_len=32, batch_size=4, pack=pack)
    batches = list(data.in_order())
    assert sorted(sample for b in batches for sample in samples(b)) == expected(rows)
    assert pack or [b.tokens.shape[0] for b in batches] == [4, 4, 4, 4, 4, 3]
    some = [sample for b in data.in_order(most=10) for sample in samples(b)]
    assert len(some) == 8 and all(sample in expected(rows) for sample in some)  # every third


def test_wrong_arguments() -> None:
    data = Rows(many(3), max_seq_len=32, batch_size=1)
    for rank, ranks in [(1, 1), (-1, 2)]:
        with pytest.raises(ValueError, match="rank must be"):
            data.batches(0, rank, ranks)
    with pytest.raises(ValueError, match="step must be"):
        data.batches(-1)
    for name in ("max_seq_len", "batch_size", "accumulate"):
        with pytest.raises(ValueError, match=name):
            Rows(many(3), **{"max_seq_len": 9, "batch_size": 1, name: 0})  # type: ignore[arg-type]


def test_tokens_that_a_base_model_has_never_seen() -> None:
    weight = torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    weight[7] = 1e-23
    weight[40] = weight[41]
    weight[50] = weight[51] * 2  # not the same
    assert untrained_tokens(weight, [3, 7, 40, 50, 7]) == [7, 40]
    assert untrained_tokens(weight.bfloat16(), range(100)) == [7, 40, 41]


def test_warning_of_special_tokens_that_a_base_model_has_never_seen() -> None:
    t = Tokenizer.from_vocabulary(*vocabulary(), "bytes")
    eot, end = t.eot_id, t.special_tokens["<|end_of_text|>"]
    rows = [Row(np.array([9, 8, eot], np.int32), np.array([False, True, True]))]
    embedding = torch.randn(t.n_words, 8, generator=torch.Generator().manual_seed(0))
    output = embedding.clone()
    output[[9, eot, end]] = 0  # 9 is no special token, and no row has the end of a text
    assert untrained_warning(rows, t, [embedding]) is None
    warning = untrained_warning(rows, t, [embedding, output])
    assert warning is not None and warning.startswith("the base was never trained on <|eot_id|>, ")
