"""Speculation: which ids to propose to a row, and how many, so that checking them pays.

A step that checks k proposed ids computes k + 1 positions of a row instead of one, and gives 1 to
k + 1 ids (arXiv:2211.17192). Where reading the weights limits a step, this costs little more than
one position. Knows how much by a table, and never measures time: what is proposed depends on ids
only, so that all ranks propose the same, and a call gives the same result each time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llama.engine.prompt_lookup import SIZES, PromptLookup
from llama.engine.proposal import NOTHING, Proposal
from llama.engine.request import Generation

if TYPE_CHECKING:
    from llama.engine.draft import Draft
    from llama.engine.slots import Slot

log = logging.getLogger("llama")

# What a step with this many positions takes, relative to one position.
POSITIONS = (1, 2, 4, 8, 16)
COSTS = {
    "bf16": (1.0, 1.04, 1.08, 1.15, 1.6),
    "fp32": (1.0, 1.4, 1.7, 2.2, 4.4),
    "int8": (1.0, 1.4, 1.7, 2.0, 2.8),
    "int4": (1.0, 1.3, 1.5, 2.1, 3.2),
}
# How often an id proposed after a match of so many ids is right, until the row shows it.
PRIOR = {6: 0.8, 3: 0.5, 2: 0.3}
PRIOR_WEIGHT = 2.0  # proposed ids that count as much as the prior
DECAY = 0.9  # of what older proposals count, in each check
WORTH = 1.03  # the least expected gain for which ids are proposed
# Time that checks may cost more than they have saved, in steps: this, and this for each id.
ALLOWANCE, ALLOWANCE_PER_ID = 0.3, 0.015


@dataclass(frozen=True)
class Speculation:
    """What an engine proposes, and when.

    Attributes:
        lookup: propose what followed the same ids earlier in the prompt or the answer.
        rows: only while at most this many rows decode: more of them share the cost of a step.
        costs: what a step with so many `POSITIONS` takes, relative to one position.
    """

    lookup: bool = True
    rows: int = 2
    costs: tuple[float, ...] = COSTS["bf16"]

    def __post_init__(self) -> None:
        if type(self.rows) is not int or not 1 <= self.rows <= POSITIONS[-1] // 2:
            raise ValueError(f"rows must be 1 to {POSITIONS[-1] // 2}, not {self.rows!r}")
        if len(self.costs) != len(POSITIONS) or not all(c >= 1 for c in self.costs):
            raise ValueError(f"costs must be {len(POSITIONS)} numbers of at least 1")

    def ratios(self, rows: int) -> list[float]:
        """For k = 0, 1, ...: what a step takes that proposes k ids to each of `rows` rows.

        Relative to one that proposes none; as far as the table goes.
        """
        cost = [self._cost(rows * (k + 1)) for k in range(POSITIONS[-1] // rows)]
        return [c / cost[0] for c in cost]

    def _cost(self, positions: int) -> float:
        i = next(i for i, n in enumerate(POSITIONS[1:]) if positions <= n)
        (a, b), (low, high) = POSITIONS[i : i + 2], self.costs[i : i + 2]
        return low + (high - low) * (positions - a) / (b - a)


class Guesses:
    """What is known about the ids proposed to one row: how often they were right, what they cost.

    Attributes:
        balance: steps that were saved, less the time of the checks in steps.
    """

    def __init__(self) -> None:
        self.lookup = PromptLookup()
        self.balance = 0.0
        self._right = dict.fromkeys(SIZES, 0.0)  # by the length of the match
        self._tried = dict.fromkeys(SIZES, 0.0)
        self._size, self._cost = 0, 0.0  # of what was proposed last

    def propose(self, generation: Generation, ratios: Sequence[float]) -> Proposal:
        """Ids that followed an earlier match, as many as pay.

        Args:
            ratios: what a check of 0, 1, ... ids costs; as many as may be proposed.
        """
        ids, size = self.lookup.find(generation.tokens, len(ratios) - 1)
        if not ids:
            return NOTHING
        rate = PRIOR[size] * PRIOR_WEIGHT + self._right[size]
        rate /= PRIOR_WEIGHT + self._tried[size]
        k = best_count(rate, ratios)
        n = len(generation.tokens) - len(generation.request.prompt)
        least = -ALLOWANCE - ALLOWANCE_PER_ID * n
        while k and self.balance - (ratios[k] - 1) < least:
            k //= 2
        self._size, self._cost = size, ratios[k] - 1
        return Proposal(ids[:k]) if k else NOTHING

    def learn(self, proposed: int, accepted: int) -> None:
        """Note the outcome of the last proposal."""
        if not proposed:
            return
        size = self._size
        self._right[size] = self._right[size] * DECAY + accepted
        self._tried[size] = self._tried[size] * DECAY + min(accepted + 1, proposed)
        self.balance += accepted - self._cost


def best_count(rate: float, ratios: Sequence[float]) -> int:
    """How many ids to propose: the most ids per time, if each is right with probability `rate`.

    0 if that is not worth it.
    """
    best, count, chance, ids = WORTH, 0, 1.0, 1.0
    for k in range(1, len(ratios)):
        chance *= rate
        ids += chance
        if ids / ratios[k] > best:
            best, count = ids / ratios[k], k
    return count


class Speculator:
    """Proposes ids to the decoding rows of an engine."""

    def __init__(self, options: Speculation | None):
        self.options = options
        rows = 0 if options is None else options.rows
        self._ratios = [options.ratios(n) for n in range(1, rows + 1)] if options else []

    def propose(
        self, decoding: Sequence[Slot], slots: Sequence[Slot], room: int
    ) -> list[Proposal]:
        """Ids to check in each decoding slot, or NOTHING.

        Args:
            slots: all of the engine's.
            room: positions of a cache row.
        """
        if len(decoding) > len(self._ratios):
            return [NOTHING] * len(decoding)
        running = [slot.running for slot in slots if slot.generation is not None]
        shared = sum(map(draws_globally, running)) > 1
        # Shorter rows are padded: the longest must leave room for what is proposed to another.
        room -= max(len(slot.cached) for slot in decoding)
        return [self._propose(slot, len(decoding), room, shared) for slot in decoding]

    def _propose(self, slot: Slot, rows: int, room: int, shared: bool) -> Proposal:
        """Ids for one of `rows` slots.

        Args:
            room: positions that may be computed.
            shared: several rows draw from torch's global generator. Then none of them is checked:
                the order of their draws, and so their ids, would depend on what was proposed.
        """
        generation = slot.running
        left = generation.budget - (len(generation.tokens) - len(generation.request.prompt))
        ratios = self._ratios[rows - 1][: min(room, left)]
        if slot.pending != 1 or len(ratios) < 2 or (shared and draws_globally(generation)):
            return NOTHING
        if slot.guesses is None:
            slot.guesses = Guesses()
        return slot.guesses.propose(generation, ratios)


def draws_globally(generation: Generation) -> bool:
    """Whether a generation takes random numbers from torch's global generator."""
    return generation.generator is None and not generation.request.sampling.greedy
