"""What training minimises. Knows no data and no optimizer.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama.distributed.device import pick_dtype
from llama.layers.lora import set_dropout_key
from llama.layers.replace import factory_of, replace_modules
from llama.model import DotProductAttention, Transformer, TransformerBlock
from llama.train.batch import Batch
from llama.train.packed_attention import PackedSamples, TrainingAttention
from llama.train.target_loss import SCORES, target_loss


class RecomputedBlock(TransformerBlock):
    """A block whose activations are computed again in the backward pass instead of kept."""

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        out: Tensor = again(super().forward, x, *rest)
        return out


def prepare_model(model: Transformer, recompute: bool = False) -> None:
    """Replace modules of a model for training; its linears and norms stay.

    Args:
        recompute: keep no activations of a block (activation checkpointing, arXiv:1604.06174).
    """
    replace_modules(model, {DotProductAttention: factory_of(TrainingAttention)})
    if recompute:
        replace_modules(model, {TransformerBlock: factory_of(RecomputedBlock)})


def compute_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The dtype of matmuls: `TrainerSettings.dtype`; None is bfloat16 where the device has it."""
    native = pick_dtype(None, device) == torch.bfloat16
    use_bf16 = native if dtype is None else dtype == "bfloat16"
    return torch.bfloat16 if use_bf16 else torch.float32


class Objective(nn.Module):
    """The training loss: the sum of the next tokens' cross-entropy over all targets, in nats.

    The trainer divides it by the targets of an update, over micro-batches and ranks.

    Args:
        model: prepared by `prepare_model`, or plain if no batch is packed.
        seed: of what is random in the model, which is nothing but dropout.
    """

    def __init__(self, model: Transformer, seed: int = 0):
        super().__init__()
        self.model = model
        self.seed = seed

    def begin(self, step: int, part: int) -> None:
        """Called before each micro-batch. `part`: its number among those of all ranks."""
        set_dropout_key(self.model, self.seed, step, part)

    def count(self, batch: Batch) -> int:
        """What a batch adds to the divisor of the loss: its targets."""
        return batch.target_count

    def forward(
        self, tokens: Tensor, targets: Tensor, lengths: tuple[int, ...] | None = None
    ) -> Tensor:
        """A `Batch` -> a scalar, fp32."""
        hidden = self.hidden(tokens, lengths)
        chunk = max(1, SCORES // self.model.vocab_size)
        return target_loss(self.model.output, hidden, targets, chunk)

    def hidden(self, tokens: Tensor, lengths: tuple[int, ...] | None = None) -> Tensor:
        """Normed hidden states of a batch, (B, T, dim)."""
        model = self.model
        if lengths is None:
            return model.hidden(tokens)
        if tokens.shape != (1, sum(lengths)):
            raise ValueError(f"{len(lengths)} packed samples of {sum(lengths)} tokens need one row")
        model.freqs_cis = model.freqs_cis.to(tokens.device)
        samples = PackedSamples(lengths)
        freqs_cis = F.embedding(samples.positions(tokens.device), model.freqs_cis)
        h = model.embed(tokens)
        for layer in model.layers:
            h = layer(h, freqs_cis, None, None, samples)
        out: Tensor = model.norm(h)
        return out
