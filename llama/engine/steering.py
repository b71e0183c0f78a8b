"""What changes a row's logits before an id is drawn: bias, penalties, a grammar. Knows no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llama.engine.grammar import Grammar, GrammarState
from llama.engine.sampling import Sampling


class Steering:
    """Bias, penalties and grammar of one answer. It follows the generated ids.

    An id's logit becomes

        logit + bias[id] - count(id) * frequency_penalty - (count(id) > 0) * presence_penalty

    where the count is that among the generated ids (OpenAI's definition). Then the ids that the
    grammar forbids become -inf.

    Attributes:
        error: why the last `apply` failed.
    """

    def __init__(self, sampling: Sampling, bias: Mapping[int, float], grammar: Grammar | None):
        self.sampling, self.bias, self.grammar = sampling, bias, grammar
        self.error: Exception | None = None
        self._followed: int | None = None  # generated ids that the fields below include
        self._offsets: dict[int, float] = {}
        self._counted: set[int] = set()
        self._state: GrammarState | None = None

    def apply(self, logits: Tensor, tokens: Sequence[int], prompt: int) -> None:
        """Make the logits those to draw the next id from, in place.

        Args:
            logits: (V,) fp32; after an error they may be anything.
            tokens: the prompt's ids, `prompt` of them, and the generated ones.

        Raises:
            ValueError: the grammar allows no id that has a chance.
            Exception: whatever the grammar raises.
        """
        # Where an interrupt comes below, the next call starts over; also where one has undone ids.
        followed, self._followed = self._followed, None
        if followed is None or followed > len(tokens) - prompt:
            followed = 0
            self._start()
        for token in tokens[prompt + followed :]:
            self._follow(token)
        if self._offsets:
            index = torch.tensor(list(self._offsets), device=logits.device)
            offsets = torch.tensor(list(self._offsets.values()), dtype=logits.dtype)
            logits.index_add_(0, index, offsets.to(logits.device))
        if self._state is not None:
            forbid(logits, self._state.allowed())
        self._followed = len(tokens) - prompt

    def _start(self) -> None:
        self._offsets, self._counted = dict(self.bias), set()
        self._state = None if self.grammar is None else self.grammar.start()

    def _follow(self, token: int) -> None:
        how = self.sampling
        if how.penalized:
            once = 0.0 if token in self._counted else how.presence_penalty
            self._counted.add(token)
            self._offsets[token] = self._offsets.get(token, 0.0) - once - how.frequency_penalty
        if self._state is not None:
            self._state.accept(token)


def forbid(logits: Tensor, allowed: Tensor) -> None:
    """Set (V,) logits to -inf where the (n,) bools are False, and from n on.

    Raises:
        TypeError: `allowed` has another type or shape.
        ValueError: nothing is left.
    """
    if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool or allowed.dim() != 1:
        raise TypeError("a grammar's allowed() must return a tensor of one dimension of bools")
    n = min(len(allowed), len(logits))
    forbidden = allowed.narrow(0, 0, n).logical_not().to(logits.device)
    logits.narrow(0, 0, n).masked_fill_(forbidden, -math.inf)
    logits.narrow(0, n, len(logits) - n).fill_(-math.inf)
    if bool(logits.amax() == -math.inf):
        raise ValueError(
            "the grammar allows no token here; where the answer may end it must allow a stop token"
        )
