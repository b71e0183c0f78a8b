"""Special tokens of the rows that a base model was never trained on. Knows no files.

Shapes: V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llama.tokenizer import Tokenizer
from llama.train.rows import Row

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


def untrained_warning(
    rows: Sequence[Row], tokenizer: Tokenizer, weights: Sequence[Tensor]
) -> str | None:
    """A warning if the rows have special tokens that the base was never trained on.

    Args:
        weights: (V, D) each: the base's embedding, and its output if that is another matrix.
    """
    names = {token: text for text, token in tokenizer.special_tokens.items()}
    used: set[int] = set()
    for row in rows:
        used |= names.keys() & set(row.ids.tolist())
    found = {token for weight in weights for token in untrained_tokens(weight, sorted(used))}
    if not found:
        return None
    texts = ", ".join(names[token] for token in sorted(found))
    return (
        f"the base was never trained on {texts}, so it may not learn to write or to end an answer "
        "with them; train their rows too (--train-embeddings, or --method full), use another "
        "template (--template alpaca), or begin with an instruct model"
    )
