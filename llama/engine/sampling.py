"""Logits -> token ids: temperature, top-k, min-p, nucleus. Knows nothing about models or text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.common.options import option

# A lower temperature is treated as 0: dividing by it may overflow, and only one id has a chance.
GREEDY_BELOW = 1e-6
# A higher one is treated as this, at which all ids are equally probable. (-inf / inf is NaN.)
UNIFORM_ABOVE = 1e30
# `nucleus` first sorts only this many of the most probable ids, and all ids if these are too few.
NUCLEUS_GUESSES = (256, 4096)


@dataclass(frozen=True)
class Sampling:
    """How to draw an id from logits.

    Attributes:
        temperature: divides the logits; 0 takes the most probable id.
        top_p: mass of the nucleus, in [0, 1]; see `sample_top_p`.
        top_k: only the k most probable ids and any as probable as the k-th; 0 is no limit.
        min_p: only ids at least this times as probable as the most probable one, in [0, 1].
        presence_penalty: subtracted from the logit of each id that was generated before, -2 to 2.
        frequency_penalty: likewise for each time that it was generated; see `Steering`.

    Raises:
        TypeError, ValueError: not a number, or out of range.
    """

    temperature: float = option(0.6, "randomness; 0 always takes the most probable token")
    top_p: float = option(0.9, "draw from the most probable tokens that hold this much of the mass")
    top_k: int = option(
        0, "draw from this many most probable tokens and ties with the last; 0 is no limit"
    )
    min_p: float = option(
        0.0,
        "draw from tokens whose probability is at least this share of the most probable one's, "
        "from 0 to 1; 0 is no limit",
    )
    presence_penalty: float = option(
        0.0, "subtracted from the logit of each token that the answer already has, -2 to 2"
    )
    frequency_penalty: float = option(
        0.0, "subtracted from a token's logit for each time that the answer already has it, -2 to 2"
    )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"{name} must be a number, not {value!r}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} must lie between -2 and 2, not {getattr(self, name)}")
        if not isinstance(self.top_k, Integral) or self.top_k < 0:
            raise ValueError(f"top_k must be 0 (no limit) or a positive integer, not {self.top_k}")

    @property
    def greedy(self) -> bool:
        """Whether the most probable id is taken."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalized(self) -> bool:
        """Whether generated ids change the logits."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


def sample(
    logits: Tensor, how: Sampling, generators: Sequence[torch.Generator] | None = None
) -> Tensor:
    """Draw one id per row.

    Args:
        logits: (B, vocab) fp32.
        generators: one per row, which makes its draws independent of the other rows. None draws
            the whole batch from torch's global generator, as the reference does.

    Returns:
        (B,) int64.
    """
    if how.greedy:
        return torch.argmax(logits, dim=-1)
    probs = limited(logits, how)
    if generators is None:
        return sample_top_p(probs, how.top_p).reshape(-1)
    weights, ids = nucleus(probs, how.top_p, stable=True)
    # In vocabulary order: rounding that depends on the batch then cannot permute the ids.
    ids, order = ids.sort()
    mass = weights.gather(-1, order).cumsum(-1)
    uniform = torch.tensor(
        [uniform_of(g) for g in generators], dtype=torch.float32, device=mass.device
    )
    target = uniform.unsqueeze(-1) * mass.narrow(-1, mass.shape[-1] - 1, 1)
    chosen = torch.searchsorted(mass, target, right=True).clamp_max(mass.shape[-1] - 1)
    return ids.gather(-1, chosen).reshape(-1)


def limited(logits: Tensor, how: Sampling) -> Tensor:
    """(B, V) logits -> probabilities after temperature, top_k and min_p; `nucleus` comes next."""
    probs = torch.softmax(logits / min(how.temperature, UNIFORM_ABOVE), dim=-1)
    if 0 < how.top_k < probs.shape[-1]:
        kth = torch.topk(probs, how.top_k, dim=-1).values.narrow(-1, how.top_k - 1, 1)
        probs = probs.where(probs >= kth, 0.0)
    if how.min_p > 0:
        probs = probs.where(probs >= how.min_p * probs.amax(-1, keepdim=True), 0.0)
    if how.top_k or how.min_p > 0:
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def distribution(logits: Tensor, how: Sampling) -> Tensor:
    """(B, V) logits -> the probability with which `sample` draws each id. Not for greedy."""
    weights, ids = nucleus(limited(logits, how), how.top_p, stable=True)
    probs = torch.zeros_like(logits).scatter_(-1, ids, weights)
    return probs / probs.sum(-1, keepdim=True)


def pick(weights: Tensor, generator: torch.Generator | None) -> int:
    """Draw an id with a probability proportional to its weight.

    Args:
        weights: (V,), not all 0.
        generator: on the CPU; None is torch's global one.
    """
    mass = weights.cumsum(-1)
    uniform = torch.rand(1, generator=generator, dtype=torch.float32, device="cpu").item()
    token = int(torch.searchsorted(mass, uniform * mass[-1:], right=True))
    if token < len(mass):
        return token
    return int(weights.nonzero().max())  # by rounding


def without(logits: Tensor, unused: Tensor | None) -> Tensor:
    """Logits to draw from, without a chance for `unused` ids. Scores are those of `logits`."""
    return logits if unused is None else logits.index_fill(-1, unused, -math.inf)


def top_logprobs(logits: Tensor, unused: Tensor | None, n: int) -> list[list[tuple[int, float]]]:
    """The n most probable ids of each row with their log-probabilities, the most probable first.

    Args:
        logits: (B, vocab).
        unused: ids that are left out.
        n: fewer come back where a row has fewer ids that have a chance.
    """
    scores = without(torch.log_softmax(logits, dim=-1), unused)
    values, ids = scores.topk(min(n, scores.shape[-1]), dim=-1)
    rows = zip(ids.tolist(), values.tolist(), strict=True)
    return [
        [(id, score) for id, score in zip(*row, strict=True) if score > -math.inf] for row in rows
    ]


def uniform_of(generator: torch.Generator) -> float:
    """The next number in [0, 1) of a generator on the CPU, which draws the same for any device."""
    return torch.rand(1, generator=generator, dtype=torch.float32).item()


def sample_rows(
    logits: Tensor, settings: Sequence[Tensor], uniform: Tensor | None, from_global: bool
) -> Tensor:
    """As `sample`, with other settings for each row, all on the device.

    No operation depends on a value that the host must know, so a CUDA graph can repeat it.

    Args:
        logits: (B, vocab) fp32.
        settings: four of (B,) fp32: each row's temperature, top_p, top_k and min_p.
        uniform: (B,) fp32: `uniform_of` each row's generator, negative for rows without one. None
            if no row has one.
        from_global: some rows are drawn from torch's global generator.

    Returns:
        (B,) int64.
    """
    best = torch.argmax(logits, dim=-1)
    if uniform is None and not from_global:
        return best
    temperature, top_p, top_k, min_p = (each.unsqueeze(-1) for each in settings)
    probs = torch.softmax(logits / temperature.clamp(GREEDY_BELOW, UNIFORM_ABOVE), dim=-1)
    weights, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
    limited = (top_k > 0) | (min_p > 0)
    last = (top_k.long() - 1).clamp(0, logits.shape[-1] - 1)
    lowest = torch.where(top_k > 0, weights.gather(-1, last), 0.0)
    lowest = torch.maximum(lowest, min_p * weights.narrow(-1, 0, 1))
    weights = weights.where(weights >= lowest, 0.0)
    weights = weights / torch.where(limited, weights.sum(-1, keepdim=True), 1.0)
    weights = _cut(weights, top_p)
    drawn = best
    if from_global:  # as torch.multinomial does, which makes the host wait
        some = weights / weights.sum(-1, keepdim=True)
        place = (some / torch.empty_like(some).exponential_()).argmax(-1, keepdim=True)
        drawn = ids.gather(-1, place).squeeze(-1)
    if uniform is not None:
        mass = torch.zeros_like(weights).scatter_(-1, ids, weights).cumsum(-1)
        target = uniform.unsqueeze(-1) * mass.narrow(-1, mass.shape[-1] - 1, 1)
        place = torch.searchsorted(mass, target, right=True).clamp_max(mass.shape[-1] - 1)
        drawn = torch.where(uniform >= 0, place.squeeze(-1), drawn)
    return torch.where(temperature.squeeze(-1) < GREEDY_BELOW, best, drawn)


def sample_top_p(probs: Tensor, p: float) -> Tensor:
    """Nucleus sampling, arXiv:1904.09751: draw from the most probable ids that have mass `p`.

    The id at which the sum crosses `p` is included, so `p` = 0 is the most probable id alone. The
    draw is one `torch.multinomial` over the sorted row from the global generator, as in the
    reference: with the same seed, one row gives the same id.

    Args:
        probs: (B, vocab), rows that sum to 1.
        p: in [0, 1].

    Returns:
        (B, 1) int64.
    """
    weights, ids = nucleus(probs, p)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    # The reference draws one random number per id of the vocabulary, including excluded ids.
    weights = F.pad(weights, (0, probs.shape[-1] - weights.shape[-1]))
    return ids.gather(-1, torch.multinomial(weights, num_samples=1))


def nucleus(probs: Tensor, p: float, stable: bool = False) -> tuple[Tensor, Tensor]:
    """(weights, ids), (B, n) each, the most probable first; ids outside the nucleus have weight 0.

    On the CPU a full sort takes longer than a small model's decode step, and the nucleus is nearly
    always within a few hundred ids.

    Args:
        stable: equally probable ids are in ascending order. Otherwise they are in the order of an
            unstable `torch.sort`, which is the reference's.
    """
    for k in NUCLEUS_GUESSES if probs.device.type == "cpu" else ():
        if k >= probs.shape[-1]:
            break
        ids = torch.topk(probs, k, dim=-1, sorted=False).indices.sort().values
        weights, order = torch.sort(probs.gather(-1, ids), dim=-1, descending=True, stable=True)
        kept = _cut(weights, p)
        # Ids as probable as the last of these k may be missing from them.
        unsure = weights == weights.narrow(-1, k - 1, 1)
        if not stable:  # the order of equally probable ids is that of a full sort
            unsure = unsure | (weights == F.pad(weights, (0, 1)).narrow(-1, 1, k))
        if not bool((unsure & (kept > 0)).any()):
            return kept, ids.gather(-1, order)
    weights, ids = torch.sort(probs, dim=-1, descending=True, stable=stable)
    return _cut(weights, p), ids


def _cut(weights: Tensor, p: float | Tensor) -> Tensor:
    """Sorted weights; 0 where the mass of the ids before exceeds `p`."""
    before = torch.cumsum(weights, dim=-1) - weights
    return torch.where(before > p, 0.0, weights)
