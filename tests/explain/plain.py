"""The oracle: Llama 3 as a few lines of arithmetic in float64, written without the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Computed:
    """One entry a layer; `residual` also has the last state."""

    residual: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotate the pairs of x (T, heads, D)."""
    T, _, D = x.shape
    out = x.clone()
    for m in range(T):
        for i in range(D // 2):
            angle = torch.tensor(m * theta ** (-2 * i / D), dtype=torch.float64)
            a, b = x[m, :, 2 * i], x[m, :, 2 * i + 1]
            out[m, :, 2 * i] = a * angle.cos() - b * angle.sin()
            out[m, :, 2 * i + 1] = a * angle.sin() + b * angle.cos()
    return out


def compute(weights: Mapping[str, Tensor], params: Mapping[str, Any], ids: list[int]) -> Computed:
    """A model without scaled RoPE."""
    w = {name: x.double() for name, x in weights.items()}
    H, K, eps = params["n_heads"], params["n_kv_heads"], params["norm_eps"]
    D, T, found = params["dim"] // H, len(ids), Computed()
    x = w["tok_embeddings.weight"][ids]
    for i in range(params["n_layers"]):
        found.residual.append(x)
        part = {n.removeprefix(f"layers.{i}."): t for n, t in w.items() if f"layers.{i}." in n}
        a = norm(x, part["attention_norm.weight"], eps)
        q = turned((a @ part["attention.wq.weight"].T).view(T, H, D), params["rope_theta"])
        k = turned((a @ part["attention.wk.weight"].T).view(T, K, D), params["rope_theta"])
        v = (a @ part["attention.wv.weight"].T).view(T, K, D)
        heads, maps = [], []
        for h in range(H):
            kv = h // (H // K)
            scores = q[:, h] @ k[:, kv].T / D**0.5
            scores[torch.ones(T, T).triu(1).bool()] = -torch.inf
            maps.append(scores.exp() / scores.exp().sum(-1, keepdim=True))
            heads.append(maps[-1] @ v[:, kv])
        found.attention.append(torch.stack(maps))
        found.keys.append(k)
        found.values.append(v)
        x = x + torch.cat(heads, -1) @ part["attention.wo.weight"].T
        f = norm(x, part["ffn_norm.weight"], eps)
        gate, up = f @ part["feed_forward.w1.weight"].T, f @ part["feed_forward.w3.weight"].T
        x = x + (gate / (1 + (-gate).exp()) * up) @ part["feed_forward.w2.weight"].T
    found.residual.append(x)
    found.logits = norm(x, w["norm.weight"], eps) @ w["output.weight"].T
    return found
