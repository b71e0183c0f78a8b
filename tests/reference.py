"""Generation as Meta's code does it, written independently: the oracle of the engine.

Full sort, `torch.multinomial` over the whole vocabulary, log-softmax of the raw logits. All prompts
of a batch have the same length, so that nothing is padded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def draw(probs: Tensor, p: float) -> int:
    """Top-p by its definition, over a full descending sort of one row."""
    values, order = probs.sort(descending=True)
    mass_before = values.cumsum(-1) - values
    values[mass_before > p] = 0.0
    values /= values.sum()
    return int(order[torch.multinomial(values, 1)])


@torch.no_grad()
def greedy(model: Any, prompts: list[list[int]], n: int) -> tuple[list[list[int]], Tensor, Tensor]:
    """`n` ids per row by Meta's `model`; stop tokens are ignored.

    Returns:
        ids with the prompt; log-probabilities of all ids but the first, (B, T + n - 1); the logits
        from which each new id was taken, (B, n, V).
    """
    tokens = torch.tensor(prompts)
    length = tokens.shape[1]
    logits = [model.forward(tokens, 0)]
    for position in range(length, length + n):
        tokens = torch.cat([tokens, logits[-1][:, -1:].argmax(-1)], dim=1)
        logits.append(model.forward(tokens[:, -1:], position))
    every = torch.cat(logits, dim=1)[:, :-1]
    scores = torch.log_softmax(every, -1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return tokens.tolist(), scores, every[:, length - 1 :]


@torch.no_grad()
def sampled(
    model: Any, prompt: list[int], n: int, stop: set[int], temperature: float, top_p: float
) -> list[int]:
    """Up to `n` new ids of one prompt, drawn from the global generator, without the stop token."""
    ids: list[int] = []
    logits = model.forward(torch.tensor([prompt]), 0)
    for position in range(len(prompt), len(prompt) + n):
        token = draw(torch.softmax(logits[0, -1] / temperature, -1), top_p)
        if token in stop:
            break
        ids.append(token)
        logits = model.forward(torch.tensor([[token]]), position)
    return ids
