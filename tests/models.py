"""Small models with random weights, and Meta's published model as the oracle."""

from __future__ import annotations

from typing import Any

import torch

from llama import ModelArgs, Transformer

TINY = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 128256,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


def meta_model(params: dict[str, Any], weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Meta's published Transformer with these weights, fp32."""
    from llama_models.llama3.args import ModelArgs as MetaArgs
    from llama_models.llama3.model import Transformer as MetaTransformer

    model: torch.nn.Module = MetaTransformer(MetaArgs(**params))
    model.load_state_dict({name: w.float() for name, w in weights.items()}, strict=True)
    return model.eval()


def random_weights(seed: int = 0, **params: Any) -> dict[str, torch.Tensor]:
    """Seeded weights of a model of this shape, scaled so that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {
            name: w.shape for name, w in Transformer(ModelArgs(**params)).state_dict().items()
        }
    return {
        name: 1 + 0.1 * torch.randn(shape, generator=generator)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * shape[1] ** -0.5
        for name, shape in shapes.items()
    }
