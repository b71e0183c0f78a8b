"""Logits -> token ids: temperature and nucleus. Knows nothing about models or text."""

from __future__ import annotations

import torch
from torch import Tensor

# Logits divided by less than this may overflow, and nothing but the most probable id has a chance.
GREEDY_BELOW = 1e-6


def sample(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw one id a row.

    Args:
        logits: (B, vocab) fp32.
        temperature: 0 takes the most probable id; otherwise logits are divided by it.
        top_p: see `sample_top_p`.

    Returns:
        (B,) int64.
    """
    if temperature < GREEDY_BELOW:
        return torch.argmax(logits, dim=-1)
    probs = torch.softmax(logits / temperature, dim=-1)
    return sample_top_p(probs, top_p).reshape(-1)


def sample_top_p(probs: Tensor, p: float) -> Tensor:
    """Nucleus sampling, arXiv:1904.09751: draw from the most probable ids that hold mass `p`.

    The id that crosses `p` belongs to the nucleus, so `p` = 0 is the most probable id alone. The
    draw is one `torch.multinomial` over the sorted row from the global generator, as in the
    reference: with the same seed, one row gives the same id.

    Args:
        probs: (B, vocab), rows that sum to 1.
        p: in [0, 1].

    Returns:
        (B, 1) int64.
    """
    probs_sort, probs_idx = torch.sort(probs, dim=-1, descending=True)
    before = torch.cumsum(probs_sort, dim=-1) - probs_sort  # mass of the more probable ids
    probs_sort = torch.where(before > p, 0.0, probs_sort)
    probs_sort /= probs_sort.sum(dim=-1, keepdim=True)
    choice = torch.multinomial(probs_sort, num_samples=1)
    return torch.gather(probs_idx, -1, choice)
