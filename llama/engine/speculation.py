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

from llama.engine.draft import Draft
from llama.engine.guesses import DRAFT, Guesses, Plan
from llama.engine.proposal import NOTHING, Proposal
from llama.engine.request import Generation
from llama.engine.slots import Slot

log = logging.getLogger("llama")

# What a step with this many positions takes, relative to one position; measured on a CPU by
# `python -m benchmarks.speculation costs`, rounded.
POSITIONS = (1, 2, 4, 8, 16)
COSTS = {
    "bfloat16": (1.0, 1.1, 1.15, 1.5, 2.4),
    "float32": (1.0, 1.8, 2.0, 2.6, 5.0),
    "int8": (1.0, 1.1, 1.3, 1.7, 2.7),
    "int4": (1.0, 1.1, 1.3, 1.6, 2.8),
    # Estimates: launching operations limits a step on a GPU; only steps of one position are
    # compiled, which makes them three times as fast.
    "gpu": (1.0, 1.1, 1.1, 1.2, 1.3),
    "compiled": (1.0, 3.0, 3.0, 3.1, 3.3),
}


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
    costs: tuple[float, ...] = COSTS["bfloat16"]

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


class Speculator:
    """Proposes ids to the decoding rows of an engine.

    Args:
        options: None proposes nothing.
        draft: also proposes, where the lookup finds nothing better.

    Raises:
        ValueError: a draft without options.
    """

    def __init__(self, options: Speculation | None, draft: Draft | None = None):
        if draft is not None and options is None:
            raise ValueError("a draft needs a Speculation, which says when it may propose")
        self.draft, self.lookup = draft, options is not None and options.lookup
        rows = 0 if options is None else options.rows
        self._ratios = [options.ratios(n) for n in range(1, rows + 1)] if options else []

    def propose(self, decoding: Sequence[Slot], slots: Sequence[Slot], room: int) -> list[Proposal]:
        """Ids to check in each decoding slot, or NOTHING.

        Args:
            slots: all of the engine's.
            room: positions of a cache row.
        """
        if len(decoding) > len(self._ratios):
            return [NOTHING] * len(decoding)
        running = [slot.running for slot in slots if slot.generation is not None]
        # The order of draws from torch's global generator, and so the ids, would depend on what is
        # proposed: rows that share it are not checked.
        shared = sum(generation.draws_globally for generation in running) > 1
        # Shorter rows are padded: the longest must leave room for what is proposed to another.
        room -= max((len(slot.cached) for slot in decoding), default=0)
        proposals = []
        for slot in decoding:
            generation = slot.running
            left = generation.budget - (len(generation.tokens) - len(generation.request.prompt))
            ratios = self._ratios[len(decoding) - 1][: min(room, left)]
            wanted = slot.pending == 1 and not (shared and generation.draws_globally)
            busy = [slot.running.id for slot in decoding]
            proposals.append(self._propose(slot, ratios, busy) if wanted else NOTHING)
        return proposals

    def _propose(self, slot: Slot, ratios: Sequence[float], busy: Sequence[int]) -> Proposal:
        """Ids for a slot.

        Args:
            ratios: see `Guesses.plan`.
            busy: the generations that decode.
        """
        if len(ratios) < 2:
            return NOTHING
        if slot.guesses is None:
            slot.guesses = Guesses()
        generation, guesses, plan = slot.running, slot.guesses, Plan(1.0, 0)
        n, found = len(generation.tokens) - len(generation.request.prompt), list[int]()
        if self.lookup:
            found, size = guesses.lookup.find(generation.tokens, len(ratios) - 1)
            plan = guesses.plan(size, ratios, n) if found else plan
        if self.draft is not None:
            cost = self.draft.cost
            drafted = guesses.plan(DRAFT, [x + k * cost for k, x in enumerate(ratios)], n)
            if drafted.number and drafted.gain > plan.gain:
                guesses.propose(drafted)
                return self._drafted(generation, drafted.number, busy)
            guesses.forget(DRAFT)
        guesses.propose(plan)
        return Proposal(found[: plan.number]) if plan.number else NOTHING

    def _drafted(self, generation: Generation, count: int, busy: Sequence[int]) -> Proposal:
        """Ids of the draft model, which is given up if it fails."""
        assert self.draft is not None
        try:
            return self.draft.propose(generation, count, busy)
        except Exception as e:  # such as out of memory: requests go on without it
            log.warning("the draft model has failed and is not used any more: %s", e)
            self.draft = None
            return NOTHING
