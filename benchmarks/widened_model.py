"""The demo model with rows and columns of zeros, so that it costs what 1B parameters cost.

Random weights of that size would not repeat text, so how fast they speculate says nothing. This
model writes what the demo model writes: it has the same layers, each with more heads, a wider
feed-forward and a larger vocabulary, whose weights are 0 and are read and multiplied like others.
The width is 4 times the demo model's: the mean of squares in a norm is then a quarter, and its
weight and epsilon are divided by 2 and 4, which is exact in every dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoints.open import open_checkpoint
from llama.common.meta_device import without_memory
from llama.model import ModelArgs, Transformer

WIDER = 4  # a power of 4
# Together 1.25e9 parameters with the demo model's 30 layers, as many as Llama 3.2 1B has.
HIDDEN, VOCABULARY = 2560, 128256


def widened(folder: Path, max_seq_len: int) -> Transformer:
    """The widened model of a checkpoint, in bfloat16 on the CPU, with tied embeddings."""
    source = open_checkpoint(folder)
    small = source.args(max_seq_len=max_seq_len, max_batch_size=1)
    params = ModelArgs(
        dim=WIDER * small.dim,
        n_layers=small.n_layers,
        n_heads=WIDER * small.n_heads,
        n_kv_heads=WIDER * small.kv_heads,
        vocab_size=VOCABULARY,
        multiple_of=HIDDEN,
        ffn_dim_multiplier=HIDDEN / (8 * WIDER * small.dim / 3),
        norm_eps=small.norm_eps / WIDER,
        rope_theta=small.rope_theta,
        max_seq_len=max_seq_len,
        max_batch_size=1,
    )
    with without_memory():
        model = Transformer(params)
    shapes = {name: w.shape for name, w in model.state_dict().items()}
    weights = {n: padded(source.read(n), s) for n, s in shapes.items() if n != "output.weight"}
    weights["output.weight"] = weights["tok_embeddings.weight"]
    model.load_state_dict(halved_norms(weights), strict=True, assign=True)
    return model.eval()


def padded(weight: Tensor, shape: torch.Size) -> Tensor:
    """A weight in the first rows and columns of zeros, which are written to memory."""
    out = torch.empty(shape, dtype=torch.bfloat16, device="cpu").fill_(0)
    out[tuple(slice(0, n) for n in weight.shape)] = weight
    return out


def halved_norms(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with those of norms divided by the square root of WIDER."""
    return {name: w / WIDER**0.5 if w.dim() == 1 else w for name, w in weights.items()}
