"""Initial weights and the optimizer. Knows nothing about data or files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from llama.layers.lora import fill
from llama.model import Transformer
from llama.train.settings import TrainerSettings


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Draw every weight on the CPU, so that it is the same on any device and number of ranks.

    Norms are 1. Embeddings are standard normal, so that the residual stream begins with unit
    variance. Matrices are normal with standard deviation 1 / sqrt(dim), which preserves variance;
    those that write to the residual stream (wo, w2) are scaled by 1 / sqrt(2 n_layers), as in
    GPT-2, so that its variance does not grow with depth.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
            continue
        kind = name.split(".")[-2]
        std = 1.0 if kind == "tok_embeddings" else model.params.dim**-0.5
        if kind in ("wo", "w2"):
            std /= math.sqrt(2 * model.n_layers)
        values = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
        fill(weight, values.normal_(0.0, std, generator=generator))


def parameter_groups(
    module: nn.Module, settings: TrainerSettings, lr_scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """AdamW's groups of the parameters that require gradients: weight decay on matrices only.

    Args:
        lr_scales: {end of a parameter's name: multiple of the learning rate}; others have 1.
    """
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            scales = (scale for end, scale in (lr_scales or {}).items() if name.endswith(end))
            decay = settings.weight_decay if weight.dim() > 1 else 0.0
            members.setdefault((decay, next(scales, 1.0)), []).append(weight)
    return [
        {"params": weights, "weight_decay": decay, "lr_scale": scale}
        for (decay, scale), weights in members.items()
    ]


def make_optimizer(
    groups: Sequence[dict[str, Any]], settings: TrainerSettings
) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over `parameter_groups`."""
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda", "mps")
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.peak_lr, betas=betas, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its multiple of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
