"""Proposals whose outcome a test decides, in the place of prompt lookup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

from llama.engine.prompt_lookup import PromptLookup
from llama.engine.request import Request
from llama.engine.speculation import Speculation
from llama.model import Transformer
from tests.engine.cases import NAN, decoded_plainly

# Proposals cost nothing, so that as many as possible are made.
FREE = Speculation(rows=4, costs=(1.0,) * 5)


def propose_answers(
    monkeypatch: pytest.MonkeyPatch,
    answers: Iterable[tuple[Sequence[int], Sequence[int]]],
    wrong: int,
) -> None:
    """Propose what is known to come next, with some wrong ids.

    Args:
        answers: prompts with the ids that will be drawn.
        wrong: each so manieth id is wrong, in an order that only depends on the ids; 0: none is.
    """
    known = [[*prompt, *ids] for prompt, ids in answers]

    def find(self: PromptLookup, tokens: Sequence[int], most: int) -> tuple[list[int], int]:
        n = len(tokens)
        coming = next((row[n:] for row in known if row[:n] == list(tokens)), [])
        ids = [*coming, *[0] * most][:most]
        for i in range(most):
            if wrong and (sum(tokens) + i) % wrong == 0:
                ids[i] = (ids[i] + 1) % NAN
        return ids, 6

    monkeypatch.setattr(PromptLookup, "find", find)


def answers_to(
    model: Transformer, requests: Iterable[Request]
) -> list[tuple[Sequence[int], Sequence[int]]]:
    """The prompts with what plain decoding gives, and the stop token that would end it."""
    found: list[tuple[Sequence[int], Sequence[int]]] = []
    for request in requests:
        ids, _ = decoded_plainly(model, request)
        found.append((request.prompt, [*ids, *request.stop_tokens]))
    return found
