"""Ids that are proposed to follow a row, and the rule that accepts or replaces those of a draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama.engine.sampling import Sampling, distribution, pick


class Proposal(NamedTuple):
    """Ids that may come next in a row.

    Attributes:
        ids: in their order.
        probs: for each id the distribution (V,) that it was drawn from. None if they were not
            drawn at random: then an id is right if it is the one that is drawn without it.
    """

    ids: Sequence[int] = ()
    probs: Sequence[Tensor] | None = None

    def drawn_at(self, n: int) -> tuple[int, Tensor] | None:
        """The nth id with its distribution; None if there is no such id or no distribution."""
        if self.probs is None or n >= len(self.ids):
            return None
        return self.ids[n], self.probs[n]


NOTHING = Proposal()


def accept_or_redraw(
    logits: Tensor, how: Sampling, token: int, q: Tensor, generator: torch.Generator | None
) -> int:
    """An id with the distribution that `sample` draws from, by the rule of arXiv:2211.17192.

    `token`, which was drawn from q, is accepted with the probability min(1, p / q); otherwise
    another id is drawn from max(p - q, 0).

    Args:
        logits: (V,) fp32, whose distribution is p.
        q: (V,) probabilities.
        generator: None draws from torch's global generator.
    """
    p = distribution(logits.unsqueeze(0), how).squeeze(0)
    uniform = torch.rand(1, generator=generator, dtype=torch.float32, device="cpu").item()
    if uniform * float(q[token]) < float(p[token]):
        return token
    rest = (p - q).clamp_min(0)
    if float(rest.sum()) <= 0:  # p is q up to rounding
        rest = p
    return pick(rest, generator)
