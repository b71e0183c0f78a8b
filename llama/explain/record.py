"""`Record`: what a model computed for one prompt, as plain tensors. Computes nothing.

Shapes: T tokens, L layers, H / K query / key-value heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.explain.next_token import NextToken
from llama.explain.stages import Stage
from llama.model import ModelArgs


@dataclass(frozen=True, eq=False, repr=False)
class Record:
    """What a model computed for a prompt: plain tensors on the CPU, fp32 unless noted.

    Attributes:
        ids, pieces: the T tokens that were computed, and their bytes.
        special: which of them are special tokens.
        decode: the tokenizer's, from a list of ids to bytes.
        total: tokens of the whole prompt; more than T where it was bounded.
        limit: what to change to get more of them, if it was bounded.
        name: of the checkpoint; empty if it is not known.
        args, dtype: the model's sizes; the dtype in which it computes and caches.
        residual: (L + 1, T, dim): the stream into layers 0, 1, ..., and out of the last.
        attention: (L, H, T, T): weights of each query (third) over the keys; rows sum to one,
            up to the rounding of `dtype`.
        keys, values: (L, T, K, D): what the cache holds; keys are rotated.
        lens_ids, lens_probs: (L + 1, T, 5): the most probable ids (int64) if the final norm and the
            output came right after each state of `residual`. The last are the model's own.
        logits: (T, V).
        logprobs: (T,): log p(token | tokens before it); NaN for the first.
        rotations, unscaled_rotations: (T, D / 2) complex64: how each position turns each pair, and
            how it would without Llama 3.1's scaling.
        frequencies, unscaled_frequencies: (D / 2,): radians a position.
        stages: the parts of the model, in order.
        next: the distribution of the token after the last.
    """

    ids: list[int]
    pieces: list[bytes]
    special: list[bool]
    decode: Callable[[list[int]], bytes]
    total: int
    limit: str
    name: str
    args: ModelArgs
    dtype: torch.dtype
    residual: Tensor
    attention: Tensor
    keys: Tensor
    values: Tensor
    lens_ids: Tensor
    lens_probs: Tensor
    logits: Tensor
    logprobs: Tensor
    rotations: Tensor
    unscaled_rotations: Tensor
    frequencies: Tensor
    unscaled_frequencies: Tensor
    stages: list[Stage]
    next: NextToken

    def piece(self, token: int) -> bytes:
        """The bytes of any id; none if no token has it."""
        return self.decode([token])

    @property
    def text(self) -> str:
        """The tokens as one text, without a special token at its start."""
        pieces = self.pieces[1:] if self.special[0] else self.pieces
        return b"".join(pieces).decode("utf-8", "replace")

    @property
    def embedded(self) -> Tensor:
        """(T, dim): the rows of the embedding."""
        return self.residual[0]

    @property
    def surprise(self) -> Tensor:
        """(T,): -log2 p of each token, in bits; NaN for the first."""
        return -self.logprobs / math.log(2)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache for one position."""
        heads, width = self.args.kv_heads, self.args.head_dim
        return 2 * self.args.n_layers * heads * width * self.dtype.itemsize

    @property
    def ungrouped_cache_bytes(self) -> int:
        """Bytes of one position if each query head had keys and values of its own."""
        return self.cache_bytes // self.args.kv_heads * self.args.n_heads
