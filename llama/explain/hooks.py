"""Hooks of torch on a plain copy of a model, which record one pass; and the logit lens.

Shapes: T tokens, L layers, H / K query / key-value heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llama.explain.stages import LAYER, Shape
from llama.model import DotProductAttention, Transformer

LENS = 5  # most probable ids that the logit lens keeps
LENS_CHUNK = 64  # positions whose logits the lens holds at once


class Collected:
    """What hooks collect during one pass.

    Attributes:
        tensors: fields of a `Record`; the first dimension counts layers, or states.
        shapes: {name of a module: shape of its output, without the row}.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Any] = {}
        self.shapes: dict[str, Shape] = {}

    def keep(self, name: str, index: int, count: int, x: Tensor) -> None:
        """Copy the only row of x to the place `index` of `count`, fp32 on the CPU."""
        x = x.detach().squeeze(0)
        if name not in self.tensors:
            shape = count, *x.shape
            self.tensors[name] = torch.empty(shape, dtype=torch.float32, device="cpu")
        self.tensors[name][index] = x

    def keep_shape(self, name: str, x: Tensor) -> None:
        self.shapes.setdefault(name, tuple(x.shape[1:]))


def attach_hooks(model: Transformer) -> Collected:
    """Hooks that collect the next pass of a plain copy."""
    found, L = Collected(), len(model.layers)

    def watch_shape(name: str) -> None:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda module, inputs, output: found.keep_shape(name, output))

    for name in ("tok_embeddings", "norm", "output"):
        watch_shape(name)
    for _, _, path in LAYER:
        if path:
            watch_shape(f"layers.0.{path}")

    def watch_stream(module: nn.Module, state: int) -> None:
        module.register_forward_hook(
            lambda module, inputs, output: found.keep("residual", state, L + 1, output)
        )

    def watch_core(module: nn.Module, layer: int) -> None:
        def hook(module: DotProductAttention, inputs: tuple[Any, ...], output: Tensor) -> None:
            xq, keys, values, mask = inputs[:4]
            found.keep_shape("rotated queries", xq)
            found.keep_shape("rotated keys", keys)
            weights = attention_weights(module, xq, keys, mask).transpose(1, 2)
            for name, x in (("keys", keys), ("values", values), ("attention", weights)):
                found.keep(name, layer, L, x)

        module.register_forward_hook(hook)

    watch_stream(model.tok_embeddings, 0)
    for i, block in enumerate(model.layers):
        watch_stream(block, i + 1)
        watch_core(block.get_submodule("attention.core"), i)
    down = model.layers[0].get_submodule("feed_forward.w2")
    down.register_forward_pre_hook(lambda module, inputs: found.keep_shape("SwiGLU", inputs[0]))
    return found


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
