"""A draft model: a smaller model of the same vocabulary that proposes what it would answer."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.engine.proposal import NOTHING, Proposal
from llama.engine.request import Generation
from llama.engine.sampling import distribution, pick, without
from llama.engine.slots import common_prefix
from llama.model import Transformer

CHUNK = 512  # positions of a prompt that are computed at once


@dataclass
class DraftRow:
    """A row of the draft's cache.

    Attributes:
        request: the generation that it follows; its id.
        cached: the ids whose keys it holds.
        checked: how many of them are known to be the generation's.
    """

    request: int = 0
    cached: list[int] = field(default_factory=list)
    checked: int = 0


class Draft:
    """A model with a KV cache of its own, which proposes ids for a few requests at a time.

    A row computes the prompt when ids are first proposed for it. Ids that were rejected are
    overwritten, as in the engine's own cache.

    Args:
        rows, room: of the cache. More requests than rows take turns, and their prompts are
            computed again.
        vocab_size: of the model that it proposes to; the rows of either may be padded.
        cost: the time of one proposed id, relative to a step of that model.

    Raises:
        ValueError: see `Transformer.new_cache`.
    """

    def __init__(self, model: Transformer, rows: int, room: int, vocab_size: int, cost: float):
        self.model, self.vocab_size, self.cost = model, vocab_size, cost
        self.cache = model.new_cache(rows, room)
        self.rows = [DraftRow() for _ in range(rows)]

    @torch.inference_mode()
    def propose(self, generation: Generation, count: int, busy: Collection[int]) -> Proposal:
        """`count` ids that may follow a generation, drawn as its request draws.

        Penalties, bias and grammar are left out: what they change is found by the check.

        Args:
            busy: generations whose rows must be kept.

        Raises:
            ValueError: the draft computes NaN.
        """
        tokens, how = generation.tokens, generation.request.sampling
        row = self._row_of(generation, busy)
        if max(tokens[self.rows[row].checked :]) >= self.model.vocab_size:
            return NOTHING  # a special token that the draft has no embedding of
        h = self._feed(row, tokens)
        ids: list[int] = []
        probs: list[Tensor] = []
        while True:
            logits = self._logits(h)
            if not bool(logits.amax().isfinite()):  # no distribution to accept ids by
                raise ValueError("its logits are not a number; use another draft")
            if how.greedy:
                ids.append(int(logits.argmax()))
            else:
                probs.append(distribution(logits, how).squeeze(0))
                ids.append(pick(probs[-1], generation.generator))
            if len(ids) == count:
                return Proposal(ids, probs or None)
            h = self._feed(row, [*tokens, *ids])

    def _row_of(self, generation: Generation, busy: Collection[int]) -> int:
        """The row of a generation; if it has none, that with the longest common beginning."""
        tokens, rows = generation.tokens, self.rows
        free = [i for i, row in enumerate(rows) if row.request not in busy]
        best = next((i for i, row in enumerate(rows) if row.request == generation.id), None)
        if best is None:
            best = max(free, key=lambda i: common_prefix(rows[i].cached, tokens))
            rows[best].request, rows[best].checked = generation.id, 0
        row = rows[best]
        n = row.checked
        n += common_prefix(row.cached[n:], tokens[n:])
        row.cached = row.cached[: min(n, len(tokens) - 1)]  # the last one predicts the next id
        row.checked = len(row.cached)
        return best

    def _feed(self, i: int, tokens: Sequence[int]) -> Tensor:
        """Compute the ids that row `i` does not hold: (dim,) hidden state of the last one."""
        row = self.rows[i]
        while True:
            start = len(row.cached)
            ids = list(tokens[start : start + CHUNK])
            at = torch.tensor([ids], device=self.model.norm.weight.device)
            h = self.model.hidden(at, start, self.cache, first_row=i)
            row.cached += ids
            if len(row.cached) == len(tokens):
                return h[0, -1]

    def _logits(self, h: Tensor) -> Tensor:
        """(1, V) logits over the vocabulary of the model that is proposed to."""
        logits = without(self.model.logits(h), self.model.unused)
        return F.pad(logits, (0, self.vocab_size - len(logits)), value=-math.inf).unsqueeze(0)
