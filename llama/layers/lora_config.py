"""Options of an adapter. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from reprlib import repr as short

TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


@dataclass(frozen=True)
class LoRAConfig:
    """Which linears of every layer are adapted, and how: y = W x + scale * B A dropout(x).

    Attributes:
        rank: r, rows of A (r, K) and columns of B (N, r).
        alpha: numerator of the scale.
        dropout: share of the inputs of A that training sets to 0.
        targets: names of TARGETS.
        rslora: scale = alpha / sqrt(rank), arXiv:2312.03732, instead of alpha / rank.
        dora: W' = m V / |V| for each row of V = W + scale * B A, arXiv:2402.09353.

    Raises:
        ValueError: a value is out of range, or a target is unknown.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = TARGETS
    rslora: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank must be a positive integer, not {short(self.rank)}")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be a positive number, not {short(self.alpha)}")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout must be a number from 0 to below 1, not {short(self.dropout)}"
            )
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(f"targets must be some of {', '.join(TARGETS)}, not {unknown}")

    @property
    def scale(self) -> float:
        """What B A x is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
