"""The parts of a model in the order in which data flows: shape, parameters, bytes, operations.

An operation is a multiplication or an addition of a matmul, so a linear of N outputs and K inputs
does 2 N K for a token. Norms, rotations and gates are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from llama.common.dtypes import dtype_name
from llama.explain.skeleton import Shared, base_of, inputs_of, low_rank_of, outputs_of
from llama.layers.quantized_linear import BlockLinear
from llama.model import Transformer

Shape = tuple[int, ...]
COPY = 0.2  # relative error of products with an int4 copy, at most; of other weights about 1.4
# In a layer: name, what computes it in model.py, and the module of the layer whose output it is.
LAYER = (
    ("attention norm", "TransformerBlock.attention_norm", "attention_norm"),
    ("queries", "Attention.wq", "attention.wq"),
    ("keys", "Attention.wk", "attention.wk"),
    ("values", "Attention.wv", "attention.wv"),
    ("rotated queries", "apply_rotary_emb", ""),
    ("rotated keys", "apply_rotary_emb", ""),
    ("attention", "DotProductAttention", "attention.core"),
    ("output of attention", "Attention.wo", "attention.wo"),
    ("feed-forward norm", "TransformerBlock.ffn_norm", "ffn_norm"),
    ("gate", "FeedForward.w1", "feed_forward.w1"),
    ("up", "FeedForward.w3", "feed_forward.w3"),
    ("SwiGLU", "FeedForward", ""),
    ("down", "FeedForward.w2", "feed_forward.w2"),
)


@dataclass(frozen=True)
class Stage:
    """A part of the model, for one prompt.

    Attributes:
        name, module: what it is, and the class, its member or the function of model.py.
        shape: of its output, in one layer.
        count: how many there are: 1, or one a layer.
        parameters, bytes, operations: of all of them together.
        storage: how its weights are stored, such as "bfloat16", "int8", "int4 + LoRA" or "int6".
    """

    name: str
    module: str
    shape: Shape
    count: int = 1
    parameters: int = 0
    bytes: int = 0
    operations: int = 0
    storage: str = ""


def stages_of(model: Transformer, shapes: Mapping[str, Shape], tokens: int) -> list[Stage]:
    """The stages of a plain copy.

    Args:
        shapes: {name of a module: shape of its output, without the row}. "SwiGLU" is that
            of the inputs of w2; "rotated queries" and "rotated keys" are those of attention.
    """
    args, embedding = model.params, model.tok_embeddings.weight
    stages = [
        Stage("ids", "Transformer.forward", (tokens,)),
        Stage(
            "embedding",
            "Transformer.tok_embeddings",
            shapes["tok_embeddings"],
            **weight_fields(embedding),
        ),
    ]
    for name, module, path in LAYER:
        shape = shapes[f"layers.0.{path}" if path else name]
        blocks = [block.get_submodule(path) if path else nn.Identity() for block in model.layers]
        sizes = [sizes_of(part, tokens) for part in blocks]
        total = {key: sum(size[key] for size in sizes) for key in sizes[0]}
        if name == "attention":  # q k^T and weights times values, for all pairs of positions
            total["operations"] = args.n_layers * 4 * tokens**2 * args.n_heads * args.head_dim
        how = ", ".join(dict.fromkeys(map(storage, blocks)))
        stages.append(Stage(name, module, shape, args.n_layers, storage=how, **total))
    stages.append(
        Stage("final norm", "Transformer.norm", shapes["norm"], **weight_fields(model.norm.weight))
    )
    total, how = output_fields(model, tokens)
    stages.append(Stage("output", "Transformer.output", shapes["output"], storage=how, **total))
    return stages


def output_fields(model: Transformer, tokens: int) -> tuple[dict[str, Any], str]:
    """Sizes and storage of the output. Parameters of a tied one count in the embedding."""
    output, embedding = model.output, model.tok_embeddings.weight
    total, how = sizes_of(output, tokens), storage(output)
    if not isinstance(output, Shared):
        return total, how
    weight = getattr(base_of(output.linear), "weight", None)
    if isinstance(weight, Tensor) and weight.data_ptr() == embedding.data_ptr():
        total |= {"parameters": 0, "bytes": 0}
        how = "the embedding's"
    elif hasattr(base_of(output.linear), "scheme") and is_copy(output.linear, embedding):
        total["parameters"] -= embedding.numel()
        how += ", a copy of the embedding"
    return total, how


@torch.no_grad()
def is_copy(linear: nn.Module, embedding: Tensor) -> bool:
    """Whether a quantized output has the embedding's weights, up to their rounding."""
    V = embedding.shape[0]
    rows = torch.arange(0, V, max(1, V // 64), device=embedding.device)
    some = embedding[rows]
    expected = some.float() @ some.float().T
    found = base_of(linear)(some.unsqueeze(0)).squeeze(0).float()[:, rows]
    return bool((found - expected).norm() <= COPY * expected.norm())


def weight_fields(weight: Tensor) -> dict[str, Any]:
    """What a `Stage` says of a weight."""
    storage = dtype_name(weight.dtype)
    return {"parameters": weight.numel(), "bytes": weight.nbytes, "storage": storage}


def sizes_of(module: nn.Module, tokens: int) -> dict[str, Any]:
    """Parameters and bytes of a module, and its operations for so many tokens."""
    if not isinstance(module, Shared):
        weights = list(module.parameters())
        parameters, size = sum(w.numel() for w in weights), sum(w.nbytes for w in weights)
        return {"parameters": parameters, "bytes": size, "operations": 0}
    base, N, K = base_of(module.linear), outputs_of(module.linear), inputs_of(module.linear)
    stored = sum(t.nbytes for t in chain(base.parameters(), base.buffers()))
    extra = low_rank_of(module.linear)
    matrices = sum(t.numel() for t in extra if t.dim() == 2)
    return {
        "parameters": module.outputs * K + sum(t.numel() for t in extra),
        "bytes": stored * module.outputs // N + sum(t.nbytes for t in extra),
        "operations": 2 * tokens * (module.outputs * K + matrices),
    }


def storage(module: nn.Module) -> str:
    """How the weights of a module are stored; empty if it has none."""
    if not isinstance(module, Shared):
        weight = next(module.parameters(), None)
        return "" if weight is None else dtype_name(weight.dtype)
    base, adapted = base_of(module.linear), low_rank_of(module.linear)
    weight = getattr(base, "weight", None)
    plain = dtype_name(weight.dtype) if isinstance(weight, Tensor) else ""
    how = f"int{base.bits}" if isinstance(base, BlockLinear) else getattr(base, "scheme", plain)
    return f"{how} + LoRA" if adapted else str(how)
