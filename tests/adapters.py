"""Random adapters, and the oracle: the model with an adapter merged in plain arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llama.distributed.sharding import weight_shapes
from llama.layers.lora import LoRAConfig
from llama.model import ModelArgs, Transformer

Adapter = tuple[LoRAConfig, dict[str, Tensor]]


def random_adapter(seed: int, args: ModelArgs, **config: Any) -> Adapter:
    """An adapter that changes what the model says: A and B have no zeros."""
    how, tensors = LoRAConfig(**config), {}
    generator = torch.Generator().manual_seed(seed)
    for name, shape in weight_shapes(args).items():
        linear = name.removesuffix(".weight")
        if linear.split(".")[-1] not in how.targets:
            continue
        N, K = shape
        a = torch.randn(how.rank, K, generator=generator) * K**-0.5
        tensors[f"{linear}.lora_a"] = a
        tensors[f"{linear}.lora_b"] = torch.randn(N, how.rank, generator=generator) / how.alpha
        if how.dora:
            tensors[f"{linear}.lora_magnitude"] = 1 + 0.3 * torch.rand(N, generator=generator)
    return how, tensors


def merged_weights(weights: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """W + scale * B A, and with DoRA its rows scaled to the length m; fp32."""
    config, tensors = adapter
    merged = dict(weights)
    for name in [name for name in tensors if name.endswith(".lora_a")]:
        linear = name.removesuffix(".lora_a")
        v = weights[f"{linear}.weight"].float()
        v = v + config.scale * (tensors[f"{linear}.lora_b"] @ tensors[name])
        if config.dora:
            v = v * (tensors[f"{linear}.lora_magnitude"] / v.norm(dim=1)).unsqueeze(1)
        merged[f"{linear}.weight"] = v
    return merged


def merged_model(
    args: ModelArgs, weights: Mapping[str, Tensor], adapter: Adapter | None
) -> Transformer:
    """A plain model with the adapter merged; None is the base."""
    model = Transformer(args)
    model.load_state_dict(dict(weights) if adapter is None else merged_weights(weights, adapter))
    return model.eval()
