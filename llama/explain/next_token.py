"""The distribution of the next token, as temperature, top-k, min-p and top-p change it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llama.engine.sampling import Sampling, distribution, limited, without


@dataclass(frozen=True, eq=False)
class NextToken:
    """Probabilities of each id, (V,) fp32 on the CPU; 0 for what cannot be drawn.

    Attributes:
        sampling: the settings.
        raw: the model's own, without ids that have no token.
        tempered: after the temperature.
        limited: after top-k and min-p too.
        final: after top-p too: what is drawn from. With temperature 0 the last three are 1 for the
            most probable id.
    """

    sampling: Sampling
    raw: Tensor
    tempered: Tensor
    limited: Tensor
    final: Tensor


def next_token(logits: Tensor, how: Sampling, unused: Tensor | None = None) -> NextToken:
    """What the engine draws from.

    Args:
        logits: (V,) fp32.
        unused: ids that are never drawn.
    """
    row = without(logits.unsqueeze(0), None if unused is None else unused.to(logits.device))
    raw = torch.softmax(row, dim=-1)
    if how.greedy:
        steps = [torch.zeros_like(raw).scatter_(-1, raw.argmax(-1, keepdim=True), 1.0)] * 3
    else:
        tempered = limited(row, replace(how, top_k=0, min_p=0.0))
        steps = [tempered, limited(row, how), distribution(row, how)]
    return NextToken(how, *(probs.squeeze(0) for probs in (raw, *steps)))
