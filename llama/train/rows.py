"""Rows of token ids -> batches: cut, dropped, shuffled, packed. Knows nothing about text.

Shapes: B rows, T positions. A row of T + 1 ids has T inputs and T targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from llama.train.batch import IGNORED, Batch
from llama.train.packing import first_fit_decreasing


class Row(NamedTuple):
    """One sample.

    Attributes:
        ids: (L,) int32.
        trained: (L,) bool: whether an id is a target. The first never is.
    """

    ids: np.ndarray
    trained: np.ndarray


class Rows:
    """The samples of one split, as batches.

    In an epoch every row is in exactly one update. The rows of an epoch are spread evenly over its
    updates, so that the last is not smaller than others by more than one row.

    Args:
        rows: samples of any length. One of over `max_seq_len` + 1 ids is cut there if a target is
            left, otherwise dropped.
        max_seq_len: most inputs of a row.
        batch_size: rows of a micro-batch.
        accumulate: micro-batches of a rank in an update.
        pack: join short rows: a row of a batch then has up to `max_seq_len` tokens of them.
        seed: of the order of an epoch.
        pad_id: the id after the end of a shorter row.

    Attributes:
        rows: the samples that are left.
        cut, dropped: how many were cut, and how many were dropped.
        tokens, targets: how many ids, and how many of them are trained.

    Raises:
        ValueError: no row is left, or an argument is out of range.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        max_seq_len: int,
        batch_size: int,
        accumulate: int = 1,
        pack: bool = False,
        seed: int = 0,
        pad_id: int = 0,
    ):
        for name, value in (("max_seq_len", max_seq_len), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, not {accumulate}")
        self.batch_size, self.accumulate, self.pack = batch_size, accumulate, pack
        self.max_seq_len, self.seed, self.pad_id = max_seq_len, seed, max(pad_id, 0)
        fitted = [_fit(row, max_seq_len + 1) for row in rows]
        self.rows = [row for row in fitted if row is not None]
        self.dropped = len(rows) - len(self.rows)
        self.cut = sum(
            f is not None and len(row.ids) > max_seq_len + 1
            for row, f in zip(rows, fitted, strict=True)
        )
        if not self.rows:
            raise ValueError(
                f"no row is left of {len(rows)}: in none does an answer begin within max_seq_len "
                f"{max_seq_len}; use a larger --max_seq_len, or other data"
            )
        self._lengths = np.array([len(row.ids) - 1 for row in self.rows])
        self._targets = np.array([int(row.trained.sum()) for row in self.rows])
        self.tokens, self.targets = int((self._lengths + 1).sum()), int(self._targets.sum())
        # Indices into `rows` in the order of their length; places of bins are indices into it.
        self._by_length = np.argsort(-self._lengths, kind="stable")
        lengths = self._lengths[self._by_length]
        self._bins = first_fit_decreasing(lengths.tolist(), max_seq_len) if pack else None
        self._orders: dict[tuple[int, int], list[list[int]]] = {}

    def __len__(self) -> int:
        """How many rows batches are made of: samples, or with `pack` joined ones."""
        return len(self.rows) if self._bins is None else len(self._bins)

    def steps_per_epoch(self, ranks: int = 1) -> int:
        """How many updates see every row once."""
        return -(-len(self) // self._update_size(ranks))

    def batches(self, step: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """A rank's micro-batches of an update: as many on every rank.

        A pure function of the arguments. Together the ranks have the update's rows once. If there
        are fewer rows than micro-batches, a batch may have no target.
        """
        if not 0 <= rank < ranks:
            raise ValueError(f"rank must be from 0 to {ranks - 1}, not {rank}")
        update = self._update(step, ranks)
        count = -(-len(update) // (ranks * self.batch_size))
        # Of every `ranks` rows of similar length each rank has one.
        mine = update[rank::ranks]
        size = self.batch_size
        parts = [mine[i * size : (i + 1) * size] for i in range(count)]
        return [self._batch(part) if part else self._without_targets() for part in parts]

    def target_count(self, step: int, ranks: int = 1) -> int:
        """Targets of a whole update."""
        return sum(int(self._targets[i]) for unit in self._update(step, ranks) for i in unit)

    def in_order(self, most: int | None = None) -> Iterator[Batch]:
        """Every row once, for evaluation; rows of similar length together.

        Args:
            most: most samples; of more, every second, third, ... is taken. None means all.
        """
        every = 1 if most is None else max(1, -(-len(self.rows) // max(most, 1)))
        chosen = [int(i) for i in self._by_length[::every]]
        units = [[i] for i in chosen]
        if self.pack:
            lengths = [int(self._lengths[i]) for i in chosen]
            bins = first_fit_decreasing(lengths, self.max_seq_len)
            units = [[chosen[place] for place in places] for places in bins]
        for i in range(0, len(units), self.batch_size):
            yield self._batch(units[i : i + self.batch_size])

    def _update_size(self, ranks: int) -> int:
        return self.batch_size * self.accumulate * ranks

    def _update(self, step: int, ranks: int) -> list[list[int]]:
        """The update's units (lists of samples that share a row), the longest first."""
        if step < 0:
            raise ValueError(f"step must be at least 0, not {step}")
        steps = self.steps_per_epoch(ranks)
        epoch, k = divmod(step, steps)
        longest = -(-len(self) // steps) if epoch == 0 else 0
        order = self._order(epoch, longest)
        size, larger = divmod(len(self), steps)  # the first `larger` updates have one more
        start = k * size + min(k, larger)
        units = order[start : start + size + (k < larger)]
        return sorted(units, key=lambda unit: -sum(self._lengths[i] for i in unit))

    def _order(self, epoch: int, longest: int) -> list[list[int]]:
        """The units in the order of an epoch; the `longest` ones come first."""
        if (epoch, longest) in self._orders:
            return self._orders[epoch, longest]
        rng = np.random.default_rng([self.seed, epoch])
        shuffled = rng.permutation(len(self.rows))
        # Rows of equal length change places among themselves, so that bins hold other rows.
        places = shuffled[np.argsort(-self._lengths[shuffled], kind="stable")].tolist()
        bins = [[i] for i in range(len(places))] if self._bins is None else self._bins
        units = [[places[i] for i in unit] for unit in bins]
        sums = np.array([sum(int(self._lengths[i]) for i in unit) for unit in units])
        first = np.argsort(-sums, kind="stable")[:longest]
        rest = np.delete(np.arange(len(units)), first)
        order = [units[i] for i in (*first, *rng.permutation(rest))]
        self._orders = {(epoch, longest): order}  # the other epochs' are not needed now
        return order

    def _batch(self, units: Sequence[Sequence[int]]) -> Batch:
        samples = [self.rows[i] for unit in units for i in unit]
        lengths = [len(row.ids) - 1 for row in samples]
        shape = (1, sum(lengths)) if self.pack else (len(samples), max(lengths))
        tokens = np.full(shape, self.pad_id, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        start = 0
        for i, (row, length) in enumerate(zip(samples, lengths, strict=True)):
            place = (0, slice(start, start + length)) if self.pack else (i, slice(length))
            tokens[place] = row.ids[:-1]
            targets[place] = np.where(row.trained[1:], row.ids[1:], IGNORED)
            start += length
        together = tuple(lengths) if self.pack else None
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), together)

    def _without_targets(self) -> Batch:
        """A short batch that trains nothing, for a rank without rows."""
        tokens = torch.from_numpy(self.rows[self._by_length[-1]].ids[:1].astype(np.int64))[None]
        return Batch(tokens, torch.full_like(tokens, IGNORED), (1,) if self.pack else None)


def _fit(row: Row, most: int) -> Row | None:
    """`row` up to its last target within `most` ids; None if there is none."""
    targets = np.flatnonzero(row.trained[:most])
    if not len(targets) or targets[-1] < 1:
        return None
    end = int(targets[-1]) + 1
    return Row(row.ids[:end], row.trained[:end])
