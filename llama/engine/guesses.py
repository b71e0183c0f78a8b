"""How many ids to propose to a row, from how often they were right there and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from llama.engine.prompt_lookup import PromptLookup

DRAFT = 0  # in the place of the length of a match: the draft model has proposed
# How often an id proposed after a match of so many ids is right, until the row shows it.
PRIOR = {6: 0.8, 3: 0.5, 2: 0.3, DRAFT: 0.7}
PRIOR_WEIGHT = 2.0  # proposed ids that count as much as the prior
DECAY = 0.9  # of what older proposals count, in each check
RECOVERY = 0.98  # likewise, in each step in which a draft proposes nothing
WORTH = 1.03  # the least expected gain for which ids are proposed
# Time that checks may cost more than they have saved, in steps: this, and this for each id.
ALLOWANCE, ALLOWANCE_PER_ID = 0.3, 0.015


class Guesses:
    """What is known about the ids proposed to one row: how often they were right, what they cost.

    Attributes:
        balance: steps that were saved, less the time of the checks in steps.
    """

    def __init__(self) -> None:
        self.lookup = PromptLookup()
        self.balance = 0.0
        self._right = dict.fromkeys(PRIOR, 0.0)  # by the length of the match, or DRAFT
        self._tried = dict.fromkeys(PRIOR, 0.0)
        self._source, self._cost = DRAFT, 0.0  # of what was proposed last

    def plan(self, source: int, ratios: Sequence[float], generated: int) -> Plan:
        """How many ids to propose, and the ids per time that are expected then.

        Args:
            source: the length of the match, or DRAFT.
            ratios: what proposing and checking 0, 1, ... ids costs; as many as may be proposed.
            generated: how many ids the row has generated.
        """
        rate = PRIOR[source] * PRIOR_WEIGHT + self._right[source]
        plan = best_plan(rate / (PRIOR_WEIGHT + self._tried[source]), ratios)
        least = -ALLOWANCE - ALLOWANCE_PER_ID * generated
        number = plan.number
        while number and self.balance - (ratios[number] - 1) < least:
            number //= 2
        return Plan(plan.gain if number else 1.0, number, source, ratios[number] - 1)

    def forget(self, source: int) -> None:
        """Let the rate of a source go back to its prior, a little in each step without it."""
        self._right[source] *= RECOVERY
        self._tried[source] *= RECOVERY

    def propose(self, plan: Plan) -> None:
        """Note what is proposed."""
        self._source, self._cost = plan.source, plan.cost

    def learn(self, proposed: int, accepted: int) -> None:
        """Note the outcome of the last proposal."""
        if not proposed:
            return
        source = self._source
        self._right[source] = self._right[source] * DECAY + accepted
        self._tried[source] = self._tried[source] * DECAY + min(accepted + 1, proposed)
        self.balance += accepted - self._cost


class Plan(NamedTuple):
    """How many ids to propose.

    Attributes:
        gain: ids per time that are expected, relative to no proposal.
        source: see `Guesses.plan`.
        cost: time of proposing and checking them, in steps.
    """

    gain: float
    number: int
    source: int = DRAFT
    cost: float = 0.0


def best_plan(rate: float, ratios: Sequence[float]) -> Plan:
    """The count with the most ids per time, if each id is right with probability `rate`.

    0 if no count is worth it.
    """
    best, chance, ids = Plan(WORTH, 0), 1.0, 1.0
    for k in range(1, len(ratios)):
        chance *= rate
        ids += chance
        if ids / ratios[k] > best.gain:
            best = Plan(ids / ratios[k], k)
    return best
