"""Hooks of torch on a plain copy of a model, which record one pass; and the logit lens.

Shapes: T tokens, L layers, H / K query / key-value heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llama.explain.stages import LAYER, Shape
from llama.model import DotProductAttention, Transformer

LENS = 5  # most probable ids that the logit lens keeps
LENS_CHUNK = 64  # positions whose logits the lens holds at once


@dataclass
class Heard:
    """What the hooks keep during one pass, one tensor a layer; and shapes of outputs."""

    residual: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)

    def tensors(self) -> dict[str, Any]:
        """Fields of a `Record`."""
        names = "residual", "attention", "keys", "values"
        return {name: torch.stack(getattr(self, name)) for name in names}


def kept(x: Tensor) -> Tensor:
    """The only row of a batch, fp32 on the CPU."""
    return x.detach().squeeze(0).float().cpu()


def attach_hooks(model: Transformer) -> Heard:
    """Hooks that record the next pass of a plain copy."""
    heard = Heard()

    def shape_of(name: str, x: Tensor) -> None:
        heard.shapes.setdefault(name, tuple(x.shape[1:]))

    def note_shape(name: str) -> None:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda module, inputs, output: shape_of(name, output))

    for name in ("tok_embeddings", "norm", "output"):
        note_shape(name)
    for _, _, path in LAYER:
        if path:
            note_shape(f"layers.0.{path}")

    def stream(module: nn.Module, inputs: Any, output: Tensor) -> None:
        heard.residual.append(kept(output))

    def core(module: DotProductAttention, inputs: tuple[Any, ...], output: Tensor) -> None:
        xq, keys, values, mask = inputs[:4]
        shape_of("rotation", xq)
        heard.keys.append(kept(keys))
        heard.values.append(kept(values))
        heard.attention.append(kept(attention_weights(module, xq, keys, mask)).transpose(0, 1))

    model.tok_embeddings.register_forward_hook(stream)
    for block in model.layers:
        block.register_forward_hook(stream)
        block.get_submodule("attention.core").register_forward_hook(core)
    down = model.layers[0].get_submodule("feed_forward.w2")
    down.register_forward_pre_hook(lambda module, inputs: shape_of("SwiGLU", inputs[0]))
    return heard


def attention_weights(
    core: DotProductAttention, xq: Tensor, keys: Tensor, mask: Tensor | None
) -> Tensor:
    """(1, T, H, S) weights of attention: what it reads from values that are unit vectors.

    Args:
        xq, keys: (1, T, H, D), (1, S, K, D).
    """
    S, K = keys.shape[1:3]
    units = torch.eye(S, dtype=keys.dtype, device=keys.device).view(1, S, 1, S)
    return core.forward(xq, keys, units.expand(1, S, K, S), mask)


@torch.no_grad()
def lens_of(model: Transformer, residual: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable ids of each state, and their probabilities: (L + 1, T, k) each."""
    w = model.norm.weight
    k = min(LENS, model.vocab_size)
    ids, probs = [], []
    for state in residual:
        found = []
        for chunk in state.split(LENS_CHUNK):
            h = chunk.to(w.device, w.dtype).unsqueeze(0)
            found.append(torch.softmax(model.logits(model.norm(h)), dim=-1).topk(k, dim=-1))
        ids.append(torch.cat([one.indices.squeeze(0).cpu() for one in found]))
        probs.append(torch.cat([one.values.squeeze(0).cpu() for one in found]))
    return torch.stack(ids), torch.stack(probs)
