"""`ModelArgs`: the sizes of a model. Knows nothing about tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class ModelArgs:
    """The keys of params.json, and the room that is reserved for inference.

    Raises:
        ValueError: the sizes cannot make a model.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    vocab_size: int = -1  # -1: taken from the tokenizer by `Llama.build`
    multiple_of: int = 256  # the feed-forward's hidden size is rounded up to a multiple of this
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 500000
    use_scaled_rope: bool = False  # Llama 3.1 and later
    rope_scale_factor: float | None = None  # None: follows from the shape

    max_batch_size: int = 32
    max_seq_len: int = 2048

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "multiple_of", "max_batch_size", "max_seq_len"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        for name in ("norm_eps", "rope_theta", "ffn_dim_multiplier", "rope_scale_factor"):
            value = getattr(self, name)
            optional = name in ("ffn_dim_multiplier", "rope_scale_factor")
            if value is None and optional:
                continue
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        if type(self.vocab_size) is not int or (self.vocab_size < 1 and self.vocab_size != -1):
            raise ValueError(f"vocab_size must be a positive integer, not {self.vocab_size!r}")
        if type(self.use_scaled_rope) is not bool:
            raise ValueError(f"use_scaled_rope must be a boolean, not {self.use_scaled_rope!r}")
        if self.dim % (2 * self.n_heads):
            raise ValueError(f"dim {self.dim} must be an even multiple of n_heads {self.n_heads}")
        if type(self.kv_heads) is not int or self.kv_heads < 1 or self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_kv_heads must divide n_heads {self.n_heads}, and is {self.n_kv_heads!r}"
            )
        if self.hidden_dim < 1:
            raise ValueError(
                f"ffn_dim_multiplier {self.ffn_dim_multiplier} leaves no feed-forward at all"
            )

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward: 2/3 of 4 * dim, times the multiplier, rounded up."""
        hidden = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * ((hidden + self.multiple_of - 1) // self.multiple_of)

    @property
    def scale_factor(self) -> float:
        """Divisor of the low RoPE frequencies: params.json does not hold it, the shape tells.

        It is 32 for Llama 3.2 1B and 3B and 8 for every other release (their model cards).
        """
        if self.rope_scale_factor is not None:
            return self.rope_scale_factor
        return 32.0 if (self.dim, self.n_layers) in ((2048, 16), (3072, 28)) else 8.0
