"""Direct preference optimization: of two answers to a prompt, the better becomes more probable.

Shapes: P pairs, T positions. Rows 2i and 2i + 1 of a batch are pair i: chosen, then rejected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.layers.lora import without_adapter
from llama.model import Transformer
from llama.train.batch import IGNORED, Batch
from llama.train.objective import Objective
from llama.train.rows import Row
from llama.train.target_loss import SCORES, target_loss

BETA = 0.1  # the paper's


class PreferenceObjective(Objective):
    """The sum over pairs of -log sigmoid(beta * margin), arXiv:2305.18290, equation 7.

    The margin is log p(chosen) - log p(rejected), less that of the reference: the same model
    without its adapter.

    Args:
        model: with an adapter, which alone is trained.
        beta: how strongly the model is kept near the reference.
    """

    def __init__(self, model: Transformer, seed: int = 0, beta: float = BETA):
        super().__init__(model, seed)
        self.beta = beta

    def count(self, batch: Batch) -> int:
        """The pairs of a batch: those that have targets."""
        return int((batch.targets != IGNORED).any(dim=1).sum()) // 2

    def forward(
        self, tokens: Tensor, targets: Tensor, lengths: tuple[int, ...] | None = None
    ) -> Tensor:
        """(2 P, T) rows -> a scalar, fp32."""
        if lengths is not None:
            raise ValueError("pairs of answers are not packed; leave pack out")
        with torch.no_grad(), without_adapter(self.model):
            reference = self.row_nats(tokens, targets)
        gains = reference - self.row_nats(tokens, targets)  # log p / p_reference of each row
        losses = -F.logsigmoid(self.beta * (gains[0::2] - gains[1::2]))
        has_targets = (targets[0::2] != IGNORED).any(dim=1)
        return (losses * has_targets).sum()

    def row_nats(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """-log p of the targets of each row, (2 P,) fp32."""
        hidden = self.hidden(tokens)
        chunk = max(1, SCORES // self.model.vocab_size)
        rows = zip(hidden.split(1), targets.split(1), strict=True)
        return torch.stack([target_loss(self.model.output, h, ids, chunk) for h, ids in rows])


class Pairs:
    """The pairs of one split, as batches; as `Rows`, whose updates count rows.

    Args:
        pairs: (chosen, rejected). One with a row of over `max_seq_len` + 1 ids is dropped.
        batch_size: rows of a micro-batch: two a pair.

    Attributes:
        rows: chosen and rejected rows by turns.
        dropped: how many rows were dropped.

    Raises:
        ValueError: no pair is left.
    """

    pack, cut = False, 0

    def __init__(
        self,
        pairs: Sequence[tuple[Row, Row]],
        *,
        max_seq_len: int,
        batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        pad_id: int = 0,
    ):
        fit = [pair for pair in pairs if max(len(row.ids) for row in pair) <= max_seq_len + 1]
        if not fit:
            raise ValueError(
                f"no pair is left of {len(pairs)}: all are longer than max_seq_len {max_seq_len}; "
                "use a larger --max_seq_len, or other data"
            )
        self.rows, self.dropped = list(chain(*fit)), 2 * (len(pairs) - len(fit))
        self.pairs = sorted(fit, key=lambda pair: -max(len(row.ids) for row in pair))
        self.size, self.accumulate = max(1, batch_size // 2), accumulate
        self.seed, self.pad_id = seed, max(pad_id, 0)
        self.tokens = sum(len(row.ids) for row in self.rows)
        self.targets = sum(int(row.trained.sum()) for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def steps_per_epoch(self, ranks: int = 1) -> int:
        """How many updates see every pair once."""
        return -(-len(self.pairs) // (self.size * self.accumulate * ranks))

    def batches(self, step: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
        """A rank's micro-batches of an update: as many on every rank. The first has the longest."""
        update = self._update(step, ranks)
        count, mine = -(-len(update) // (ranks * self.size)), update[rank::ranks]
        parts = [mine[i * self.size : (i + 1) * self.size] for i in range(count)]
        return [self._batch(part) for part in parts]

    def target_count(self, step: int, ranks: int = 1) -> int:
        """The pairs of a whole update."""
        return len(self._update(step, ranks))

    def in_order(self, most: int | None = None) -> Iterator[Batch]:
        """Every pair once, for evaluation; of more than `most` rows, every second, third, ..."""
        every = 1 if most is None else -(-len(self.rows) // max(most, 2))
        chosen = list(range(0, len(self.pairs), every))
        for i in range(0, len(chosen), self.size):
            yield self._batch(chosen[i : i + self.size])

    def _update(self, step: int, ranks: int) -> list[int]:
        """The pairs of an update, the longest first."""
        steps = self.steps_per_epoch(ranks)
        epoch, k = divmod(step, steps)
        first = np.arange(-(-len(self.pairs) // steps) if epoch == 0 else 0)
        rest = np.arange(len(first), len(self.pairs))
        order = np.concatenate([first, np.random.default_rng([self.seed, epoch]).permutation(rest)])
        return sorted(np.array_split(order, steps)[k].tolist())

    def _batch(self, numbers: Sequence[int]) -> Batch:
        """The rows of some pairs; of none, a short pair that trains nothing."""
        rows = list(chain(*(self.pairs[i] for i in numbers or [-1])))
        shape = len(rows), max(len(row.ids) for row in rows) - 1
        tokens, targets = np.full(shape, self.pad_id, np.int64), np.full(shape, IGNORED, np.int64)
        for i, row in enumerate(rows):
            length = len(row.ids) - 1
            tokens[i, :length] = row.ids[:-1]
            if numbers:
                targets[i, :length] = np.where(row.trained[1:], row.ids[1:], IGNORED)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets))
