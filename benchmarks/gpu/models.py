"""Models with seeded random weights made on the device, and what a step of them reads.

No file is read. Weights are normal with standard deviation 0.02, norms are 1.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.timing import wait
from llama.model import ModelArgs, Transformer


def random_model(
    shape: dict[str, Any],
    rows: int,
    length: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> Transformer:
    """A plain model for a cache of `rows` x `length` positions."""
    args = ModelArgs(**shape, max_batch_size=rows, max_seq_len=length)
    with torch.device("meta"):
        model = Transformer(args).to(dtype)
    fill(model, device)
    wait(device)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module, device: torch.device) -> None:
    """Give a model on the meta device its weights."""
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(1)
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(0.0, 0.02, generator=generator)


def weights_read(model: Transformer) -> int:
    """Bytes of weights that a decoding step reads: all but the embedding."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(t.nbytes for name, t in tensors if not name.startswith("tok_embeddings"))


def cache_read(args: ModelArgs, rows: int, positions: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of `positions` cached positions in each of `rows` rows."""
    return 2 * args.n_layers * args.kv_heads * args.head_dim * dtype.itemsize * positions * rows


def layer_parameters(model: Transformer) -> int:
    """Parameters of a plain model's layers, without embedding and output."""
    return sum(w.numel() for name, w in model.named_parameters() if name.startswith("layers."))


def prompt(vocab_size: int, length: int, seed: int = 0) -> list[int]:
    """Seeded ids."""
    rng = random.Random(seed)
    return [rng.randrange(vocab_size) for _ in range(length)]
