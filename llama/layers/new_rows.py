"""Embedding and output whose first rows are frozen, so that only those of new tokens are trained.

Shapes: V rows, of which the first F are frozen; D dim.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.distributed.sharding import VOCABULARY
from llama.layers.replace import replace_modules
from llama.model import Transformer

NEW_ROWS = "new_rows"


class _Rows(nn.Module):
    """A weight in two parts: `weight` (F, D) and `new_rows` (V - F, D), which may be fp32."""

    def __init__(self, rows: Tensor, first: int):
        super().__init__()
        self.weight = nn.Parameter(rows[:first].clone())
        self.new_rows = nn.Parameter(rows[first:].clone())


class EmbeddingWithNewRows(_Rows):
    """Looks up ids in both parts."""

    def forward(self, tokens: Tensor) -> Tensor:
        first = len(self.weight)
        is_new = (tokens >= first).unsqueeze(-1)
        old = F.embedding(tokens.clamp(max=first - 1), self.weight)
        new = F.embedding((tokens - first).clamp(min=0), self.new_rows)
        return torch.where(is_new, new.to(old.dtype), old)


class OutputWithNewRows(_Rows):
    """The logits of both parts."""

    def forward(self, x: Tensor) -> Tensor:
        new = self.new_rows.to(self.weight.dtype)
        return torch.cat([F.linear(x, self.weight), F.linear(x, new)], -1)


def split_rows(model: Transformer, first: int) -> None:
    """Split embedding and output after `first` rows. What is tied stays so.

    Raises:
        ValueError: there is no row `first`.
    """
    if not 0 < first < model.vocab_size:
        raise ValueError(f"embeddings_from {first}: the rows are 0 to {model.vocab_size - 1}")
    tied = model.output.weight is model.tok_embeddings.weight
    kinds: list[tuple[type[nn.Module], type[_Rows]]] = [
        (nn.Embedding, EmbeddingWithNewRows),
        (nn.Linear, OutputWithNewRows),
    ]
    for kind, split in kinds:

        def replacement(name: str, module: nn.Module, split: type[_Rows] = split) -> nn.Module:
            is_whole = f"{name}.weight" in VOCABULARY
            return split(cast(Tensor, module.weight), first) if is_whole else module

        replace_modules(model, {kind: replacement})
    if tied:
        tie(model)


def tie(model: Transformer) -> None:
    """Make the output's weights those of the embedding, in one part or in two."""
    for name, weight in model.tok_embeddings.named_parameters():
        setattr(model.output, name, weight)


def join_rows(weights: dict[str, Tensor], frozen: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` with whole weights in place of new rows.

    Args:
        weights: {name: tensor} of trained parameters.
        frozen: {"tok_embeddings.weight": the rows before the new ones, ...}.
    """
    joined = {}
    for name, w in weights.items():
        layer, _, part = name.rpartition(".")
        if part == NEW_ROWS:
            name = f"{layer}.weight"
            w = torch.cat([frozen[name].to(w.device, w.dtype), w])
        joined[name] = w
    return joined
