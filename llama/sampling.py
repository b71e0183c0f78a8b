"""Logits -> token ids: temperature, top-k, min-p, nucleus. Knows nothing about models or text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Logits divided by less than this may overflow, and nothing but the most probable id has a chance.
GREEDY_BELOW = 1e-6


@dataclass(frozen=True)
class Sampling:
    """How to draw an id.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable id.
        top_p: mass of the nucleus, in [0, 1]; see `sample_top_p`.
        top_k: only the k most probable ids; 0 is no limit.
        min_p: only ids at least this times as probable as the most probable one, in [0, 1].

    Raises:
        TypeError, ValueError: not a number, or out of range.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "top_k", "min_p"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, not {value!r}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be 0 (no limit) or a positive integer, not {self.top_k}")


def sample(
    logits: Tensor, how: Sampling, generators: Sequence[torch.Generator] | None = None
) -> Tensor:
    """Draw one id a row.

    Args:
        logits: (B, vocab) fp32.
        generators: one a row, so that a row's draws are its own; None draws the whole batch from
            the global generator, as the reference does.

    Returns:
        (B,) int64.
    """
    if how.temperature < GREEDY_BELOW:
        return torch.argmax(logits, dim=-1)
    probs = torch.softmax(logits / how.temperature, dim=-1)
    if 0 < how.top_k < probs.shape[-1]:
        kth = torch.topk(probs, how.top_k, dim=-1).values.narrow(-1, how.top_k - 1, 1)
        probs = probs.where(probs >= kth, 0.0)
    if how.min_p > 0:
        probs = probs.where(probs >= how.min_p * probs.amax(-1, keepdim=True), 0.0)
    if how.top_k or how.min_p > 0:
        probs = probs / probs.sum(-1, keepdim=True)
    if generators is None:
        return sample_top_p(probs, how.top_p).reshape(-1)
    rows = zip(probs.split(1), generators, strict=True)
    return torch.cat([sample_top_p(row, how.top_p, generator) for row, generator in rows]).view(-1)


def sample_top_p(probs: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Nucleus sampling, arXiv:1904.09751: draw from the most probable ids that hold mass `p`.

    The id that crosses `p` belongs to the nucleus, so `p` = 0 is the most probable id alone. The
    draw is one `torch.multinomial` over the sorted row, by default from the global generator, as
    in the reference: with the same seed, one row gives the same id.

    Args:
        probs: (B, vocab), rows that sum to 1.
        p: in [0, 1].
        generator: draws from this one, and then ids that are about equally probable do not change
            places.

    Returns:
        (B, 1) int64.
    """
    probs_sort, probs_idx = torch.sort(probs, dim=-1, descending=True)
    before = torch.cumsum(probs_sort, dim=-1) - probs_sort  # mass of the more probable ids
    probs_sort = torch.where(before > p, 0.0, probs_sort)
    probs_sort /= probs_sort.sum(dim=-1, keepdim=True)
    if generator is not None:
        # In vocabulary order: a last digit that depends on the batch cannot permute the ids.
        nucleus = torch.zeros_like(probs).scatter(-1, probs_idx, probs_sort)
        return torch.multinomial(nucleus, num_samples=1, generator=generator)
    choice = torch.multinomial(probs_sort, num_samples=1)
    return torch.gather(probs_idx, -1, choice)
