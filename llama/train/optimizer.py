"""A new model's weights, and what updates them. Knows no data and no files."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llama.model import Transformer
from llama.train.settings import Settings


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Draw every weight, on the CPU: the same ones on any device and any number of ranks.

    Norms are 1 and embeddings normal, so that the residual stream begins at unit size.
    Matrices have the deviation 1 / sqrt(dim), which keeps the size of what they multiply; those
    that write to the residual stream (wo, w2) are narrower by sqrt(2 n_layers), as GPT-2's:
    their sum over the layers stays as wide.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
            continue
        kind = name.split(".")[-2]
        deviation = 1.0 if kind == "tok_embeddings" else model.params.dim**-0.5
        if kind in ("wo", "w2"):
            deviation /= math.sqrt(2 * model.n_layers)
        drawn: Tensor = torch.empty(weight.shape).normal_(0.0, deviation, generator=generator)
        drawn = drawn.to(weight.device)
        if isinstance(weight, DTensor):
            drawn = distribute_tensor(drawn, weight.device_mesh, weight.placements)
        weight.copy_(drawn)


def make_optimizer(module: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW, arXiv:1711.05101; it decays matrices and leaves norms alone."""
    weights = list(module.parameters())
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [w for w in weights if w.dim() == 1], "weight_decay": 0.0},
    ]
    fused = weights[0].device.type in ("cpu", "cuda", "mps")
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.peak_lr, betas=betas, fused=fused)
