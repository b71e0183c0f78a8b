"""Tokens that a base model has never seen. Knows nothing about text.

Shapes: V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALL = 1e-3  # of the median row's largest value


def untrained_tokens(weight: Tensor, ids: Sequence[int]) -> list[int]:
    """Those of `ids` whose row of an embedding looks as if it was never trained.

    Such a row is nearly zero, or equals another one bit for bit. The turn tokens of Llama 3's base
    models are such: a model cannot end an answer with one unless its row is trained too.

    Args:
        weight: (V, D), of the embedding or the output.
    """
    weight = weight.detach()
    largest = torch.cat([part.abs().amax(1) for part in weight.split(1 << 14)])  # (V,)
    limit = SMALL * float(largest.float().median())
    found = []
    for token in dict.fromkeys(ids):
        row = weight[token]
        alike = (weight[:, 0] == row[0]).nonzero()[:, 0]  # few: those that begin alike
        same = int((weight[alike] == row).all(1).sum()) > 1  # it is one of them itself
        if same or float(largest[token]) <= limit:
            found.append(token)
    return found
