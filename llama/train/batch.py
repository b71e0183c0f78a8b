"""What a training step is given: token ids and the ids that are to follow them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

IGNORED = -100  # in `targets`: not trained on; F.cross_entropy's default


class Batch(NamedTuple):
    """Rows of token ids, one sample each; or one row of packed samples.

    Shapes: B rows, T positions.

    Attributes:
        tokens: (B, T) int64. Shorter samples are padded on the right.
        targets: (B, T) int64: the id that follows each token, or IGNORED.
        lengths: how many tokens each sample of the only row has; their sum is T. A packed sample
            sees no other one, and its positions begin at 0. None: a row is one sample.
    """

    tokens: Tensor
    targets: Tensor
    lengths: tuple[int, ...] | None = None

    @property
    def target_count(self) -> int:
        """How many tokens are trained on."""
        return int((self.targets != IGNORED).sum())
