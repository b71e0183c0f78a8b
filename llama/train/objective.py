"""What training minimises. Knows no data and no optimizer.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama.layers.optimize import optimize
from llama.layers.replace import factory_of, replace_modules
from llama.model import Transformer, TransformerBlock


class RecomputedBlock(TransformerBlock):
    """A block whose activations are computed again in the backward pass instead of kept."""

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        out: Tensor = again(super().forward, x, *rest)
        return out


def prepare_model(model: Transformer, recompute: bool = False) -> None:
    """Replace modules of a plain model for training.

    Args:
        recompute: keep no activations of a block (activation checkpointing, arXiv:1604.06174).
    """
    optimize(model, exact=True)  # its linears and norms stay plain, which have gradients
    if recompute:
        replace_modules(model, {TransformerBlock: factory_of(RecomputedBlock)})


class Objective(nn.Module):
    """The training loss: the mean cross-entropy of the next token, in nats."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Token ids x and their successors y, both (B, T) -> a scalar."""
        logits = self.model(x)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())
