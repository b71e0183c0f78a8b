"""How the weights of a model are split over the ranks that share it. Imports no model.

The layout is fairscale's, as in Meta's checkpoints: a matrix is split along one of its dimensions,
and norms are replicated on every rank.
"""

from __future__ import annotations

import math
from typing import Protocol

# The dimension along which a weight is split: 0 for outputs (or token ids), 1 for inputs.
SHARD_DIM = {
    "wq": 0, "wk": 0, "wv": 0, "wo": 1,
    "w1": 0, "w2": 1, "w3": 0,
    "tok_embeddings": 0, "output": 0,
}  # fmt: skip
# Weights with one row per token id; see `vocabulary_share`.
VOCABULARY = ("tok_embeddings.weight", "output.weight")


class Sizes(Protocol):
    """The sizes of a model, such as `llama.model.ModelArgs`."""

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    max_seq_len: int

    @property
    def kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def hidden_dim(self) -> int: ...


def rank_counts(args: Sizes) -> list[int]:
    """The numbers of ranks that can share a model; any number can split the vocabulary."""
    small = [n for n in range(1, math.isqrt(args.n_heads) + 1) if args.n_heads % n == 0]
    return [
        n
        for n in sorted({*small, *(args.n_heads // n for n in small)})
        if (args.kv_heads % n == 0 or n % args.kv_heads == 0) and args.hidden_dim % n == 0
    ]


def vocabulary_share(args: Sizes, ranks: int) -> int:
    """Rows of the embedding and of the output on each rank, padding of the last ranks included."""
    return -(-args.vocab_size // ranks)


def shard_dim(name: str) -> int | None:
    """The dimension along which the weight `name` is split; None if it is replicated."""
    return SHARD_DIM.get(name.split(".")[-2])


def weight_shapes(args: Sizes, n_layers: int | None = None) -> dict[str, tuple[int, ...]]:
    """{name: unsplit shape} of every weight of a model, in the order of Meta's files.

    Args:
        n_layers: only this number of layers; None means all.
    """
    dim, hidden, kv_dim = args.dim, args.hidden_dim, args.kv_heads * args.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attention.wq": (dim, dim),
        "attention.wk": (kv_dim, dim),
        "attention.wv": (kv_dim, dim),
        "attention.wo": (dim, dim),
        "feed_forward.w1": (hidden, dim),
        "feed_forward.w2": (dim, hidden),
        "feed_forward.w3": (hidden, dim),
        "attention_norm": (dim,),
        "ffn_norm": (dim,),
    }
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (args.vocab_size, dim)}
    for i in range(args.n_layers if n_layers is None else n_layers):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"norm.weight": (dim,), "output.weight": (args.vocab_size, dim)}


def rank_part(name: str, args: Sizes, rank: int, size: int) -> tuple[int, int, int] | None:
    """The part of a weight on rank `rank` of `size`: (dim, start, stop); None if it is replicated.

    With more ranks than KV heads, consecutive ranks share a head. If the number of ranks does not
    divide the vocabulary, the last ranks have fewer rows than `vocabulary_share`, or none.
    """
    dim = shard_dim(name)
    if dim is None:
        return None
    if name.split(".")[-2] in ("wk", "wv"):
        heads = max(args.kv_heads // size, 1)
        first = rank * args.kv_heads // size
        return dim, first * args.head_dim, (first + heads) * args.head_dim
    if name in VOCABULARY:
        n = vocabulary_share(args, size)
        return dim, min(rank * n, args.vocab_size), min((rank + 1) * n, args.vocab_size)
    n = weight_shapes(args)[name][dim] // size
    return dim, rank * n, (rank + 1) * n


def rank_shapes(args: Sizes, ranks: int) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the weights of rank 0, the largest part, with one layer for all."""
    shapes = weight_shapes(args, n_layers=1)
    for name, shape in shapes.items():
        if part := rank_part(name, args, 0, ranks):
            dim, start, stop = part
            shapes[name] = (*shape[:dim], stop - start, *shape[dim + 1 :])
    return shapes
