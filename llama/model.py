"""The Llama 3 transformer: token ids in, logits out. Knows nothing about files, text or sampling.

Plain torch, to be read from top to bottom. What is faster or smaller replaces modules of this file
(llama/layers), and is tested against it.

Shapes: B rows, T new positions a row, S positions read, V vocabulary, D head_dim,
H / K this rank's query / key-value heads. Names are those of Meta's code and checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.distributed import tensor_parallel
from llama.distributed.sharding import rank_counts, vocabulary_share
from llama.distributed.tensor_parallel import copy_to_ranks, gather_from_ranks, reduce_from_ranks

MAX_SIZE = 2**31  # no model is so large; larger sizes come from damaged files


@dataclass
class ModelArgs:
    """The sizes of a model: the keys of params.json, and the size of the KV cache.

    Raises:
        ValueError: no model can have these sizes.
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
            if type(value) is not int or not 1 <= value < MAX_SIZE:
                raise ValueError(f"{name} must be a positive integer below 2^31, not {value!r}")
        for name in ("norm_eps", "rope_theta", "ffn_dim_multiplier", "rope_scale_factor"):
            value = getattr(self, name)
            optional = name in ("ffn_dim_multiplier", "rope_scale_factor")
            if value is None and optional:
                continue
            if type(value) not in (int, float) or not 0 < value < 2**63:
                raise ValueError(f"{name} must be a positive number below 2^63, not {value!r}")
        if type(self.vocab_size) is not int or not (
            1 <= self.vocab_size < MAX_SIZE or self.vocab_size == -1
        ):
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
                f"ffn_dim_multiplier {self.ffn_dim_multiplier} makes the feed-forward empty"
            )
        if self.hidden_dim >= MAX_SIZE:
            raise ValueError(
                f"multiple_of {self.multiple_of} and ffn_dim_multiplier {self.ffn_dim_multiplier} "
                "make the feed-forward wider than 2^31"
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
        """Divisor of the low RoPE frequencies. params.json omits it, so it follows from the shape.

        It is 32 for Llama 3.2 1B and 3B and 8 for every other release (source: model cards).
        """
        if self.rope_scale_factor is not None:
            return self.rope_scale_factor
        return 32.0 if (self.dim, self.n_layers) in ((2048, 16), (3072, 28)) else 8.0


def plain_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear without bias, in fp32 whatever torch's default dtype is."""
    return nn.Linear(inputs, outputs, bias=False, dtype=torch.float32)


class RMSNorm(nn.Module):
    """Root-mean-square norm, arXiv:1910.07467: computed in fp32, cast, then times the weight."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=torch.float32))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x.float()).type_as(x) * self.weight


def apply_scaling(freqs: Tensor, scale_factor: float = 8.0) -> Tensor:
    """Llama 3.1's RoPE scaling (arXiv:2407.21783, section 3.4.2): stretch the long wavelengths.

    The frequency of a wavelength above 8192 positions is divided by `scale_factor`; below 2048 it
    is unchanged; between them the two are blended linearly in 8192 / wavelength.
    """
    low_freq_factor, high_freq_factor, original_context = 1, 4, 8192
    wavelen = 2 * math.pi / freqs
    smooth = (original_context / wavelen - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * freqs / scale_factor + smooth * freqs


def precompute_freqs_cis(
    dim: int,
    end: int,
    theta: float = 10000.0,
    use_scaled: bool = False,
    scale_factor: float = 8.0,
) -> Tensor:
    """RoPE, arXiv:2104.09864: position m turns pair i by the angle m * theta^(-2i/dim).

    Returns:
        (end, dim / 2) complex64 of modulus 1, on the CPU.
    """
    exponent = torch.arange(0, dim, 2, device="cpu", dtype=torch.float32)[: dim // 2] / dim
    freqs = 1.0 / (theta**exponent)
    if use_scaled:
        freqs = apply_scaling(freqs, scale_factor)
    angles = torch.outer(torch.arange(end, device="cpu", dtype=torch.float32), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def reshape_for_broadcast(freqs_cis: Tensor, x: Tensor) -> Tensor:
    """View `freqs_cis` as (1 or B, T, 1, D / 2), to multiply all heads of x (B, T, heads, D / 2).

    Args:
        freqs_cis: (T, D / 2), or (B, T, D / 2) where rows have different positions.

    Raises:
        ValueError: x has other positions or another width.
    """
    T, half = x.shape[1], x.shape[-1]
    if freqs_cis.shape not in ((T, half), (len(x), T, half)):
        raise ValueError(f"freqs_cis {tuple(freqs_cis.shape)} do not fit x {tuple(x.shape)}")
    return freqs_cis.reshape(-1, T, 1, half)


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each pair (2i, 2i + 1) of every head, in fp32 whatever the dtype of x.

    Args:
        xq, xk: (B, T, heads, D).
        freqs_cis: (T, D / 2), or (B, T, D / 2) where rows have different positions.
    """

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        turned = pairs * reshape_for_broadcast(freqs_cis, pairs)
        return torch.view_as_real(turned).flatten(-2).type_as(x)

    return rotate(xq), rotate(xk)


class CacheSlice(NamedTuple):
    """The part of a KV cache that a step writes and reads.

    Attributes:
        rows, positions: int64, (B, 1) and (B or 1, T): where each new position is written.
        queries, keys, ends: int32, for attention kernels that see the rows as one long sequence:
            where each row's new positions begin in it (B + 1,), where each row of the cache begins
            (B + 1,), and how many positions of it are read (B,).
        first_row: the first of the B consecutive cache rows in `rows`.
        length: positions 0 to length - 1 of those rows are read.
    """

    rows: Tensor
    positions: Tensor
    queries: Tensor
    keys: Tensor
    ends: Tensor
    first_row: int
    length: int


class KVCache:
    """Keys and values of one layer, (max_batch, max_seq, K, D) each.

    Row b's position p is `k[b, p]`. For example, a row with 3 cached positions that is fed 2 ids
    writes positions 3 and 4, and its new queries read positions 0 to 3 and 0 to 4. Positions after
    a row's own may hold anything finite: the mask gives them weight 0 (and 0 times NaN is NaN),
    and they are overwritten before the row reaches them.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device):
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, xk: Tensor, xv: Tensor, at: CacheSlice) -> tuple[Tensor, Tensor]:
        """Write (B, T, K, D) keys and values; return those to read, (B, at.length, K, D) views."""
        B = len(xk)
        self.k.index_put_((at.rows, at.positions), xk)
        self.v.index_put_((at.rows, at.positions), xv)
        keys = self.k.narrow(0, at.first_row, B).narrow(1, 0, at.length)
        values = self.v.narrow(0, at.first_row, B).narrow(1, 0, at.length)
        return keys, values

    def clear(self, row: int, start: int, stop: int) -> None:
        """Zero the positions `start`:`stop` of a row."""
        for cache in (self.k, self.v):
            cache[row, start:stop] = 0

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of row `source` to row `target`."""
        for cache in (self.k, self.v):
            cache[target, :length] = cache[source, :length]

    def swap_rows(self, a: int, b: int, length: int) -> None:
        """Exchange the first `length` positions of two rows."""
        for cache in (self.k, self.v):
            kept = cache[a, :length].clone()
            cache[a, :length] = cache[b, :length]
            cache[b, :length] = kept


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """(B, S, K, D) -> (B, S, K * n_rep, D): each key-value head n_rep times in a row."""
    return x if n_rep == 1 else x.repeat_interleave(n_rep, dim=2)


def causal_mask(positions: Tensor, length: int) -> Tensor:
    """True where a query may look, keys 0 to its own position: (T, S), or (B, 1, T, S)."""
    mask = torch.arange(length, device=positions.device) <= positions.unsqueeze(-1)
    return mask.unsqueeze(1) if mask.dim() == 3 else mask


class DotProductAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v, arXiv:1706.03762, with grouped queries, arXiv:2305.13245."""

    def forward(
        self,
        xq: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        at: CacheSlice | None = None,
    ) -> Tensor:
        """Read the values with scores in the model's dtype and the softmax in fp32.

        Args:
            xq: (B, T, H, D); query head h reads key-value head h // (H / K).
            keys, values: (B, S, K, D).
            mask: booleans, true where a query may look, (T, S) or (B, 1, T, S). None: causal if
                T = S, everything if T = 1.
            at: with a cache, where the new positions are; a query sees keys 0 to its own position.
                Not used here; replacements may read it instead of the mask.

        Returns:
            (B, T, H, D).
        """
        _, T, H, D = xq.shape
        S = keys.shape[1]
        keys, values = (repeat_kv(x, H // x.shape[2]).transpose(1, 2) for x in (keys, values))
        scores = xq.transpose(1, 2) @ keys.transpose(2, 3) / math.sqrt(D)  # (B, H, T, S)
        if mask is None:
            mask = torch.ones(T, S, dtype=torch.bool, device=xq.device).tril(S - T)
        scores = scores.masked_fill(~mask, float("-inf"))
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        return (scores @ values).transpose(1, 2)


class Attention(nn.Module):
    """Grouped-query attention; this rank has its share of the heads."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        ranks = tensor_parallel.size()
        self.n_local_heads = args.n_heads // ranks
        self.n_local_kv_heads = max(args.kv_heads // ranks, 1)  # several ranks may share a head
        self.head_dim = args.head_dim
        self.core = DotProductAttention()

        q_dim, kv_dim = self.n_local_heads * self.head_dim, self.n_local_kv_heads * self.head_dim
        self.wq = plain_linear(args.dim, q_dim)
        self.wk = plain_linear(args.dim, kv_dim)
        self.wv = plain_linear(args.dim, kv_dim)
        self.wo = plain_linear(q_dim, args.dim)

    def heads(self, x: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, T, H, D), rotated keys and plain values (B, T, K, D)."""
        B, T, _ = x.shape
        xq = self.wq(x).view(B, T, self.n_local_heads, self.head_dim)
        xk = self.wk(x).view(B, T, self.n_local_kv_heads, self.head_dim)
        xv = self.wv(x).view(B, T, self.n_local_kv_heads, self.head_dim)
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis)
        return xq, xk, xv

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        at: CacheSlice | None = None,
    ) -> Tensor:
        """(B, T, dim) -> (B, T, dim). With a cache, new keys and values are written `at` there."""
        B, T, _ = x.shape
        xq, keys, values = self.heads(copy_to_ranks(x), freqs_cis)
        if cache is not None and at is not None:
            keys, values = cache.update(keys, values, at)
        out = self.core(xq, keys, values, mask, at).reshape(B, T, -1)
        return reduce_from_ranks(self.wo(out))


class FeedForward(nn.Module):
    """SwiGLU, arXiv:2002.05202: w2(silu(w1 x) * w3 x); this rank has its share of the width."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        hidden = args.hidden_dim // tensor_parallel.size()
        self.w1 = plain_linear(args.dim, hidden)
        self.w2 = plain_linear(hidden, args.dim)
        self.w3 = plain_linear(args.dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = copy_to_ranks(x)
        return reduce_from_ranks(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class TransformerBlock(nn.Module):
    """One layer: x + attention(norm x), then + feed_forward(norm of that)."""

    def __init__(self, layer_id: int, args: ModelArgs):
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        at: CacheSlice | None = None,
    ) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis, mask, cache, at)
        out: Tensor = h + self.feed_forward(self.ffn_norm(h))
        return out


class Layers(nn.ModuleList):
    """The blocks, one after the other."""

    def forward(
        self,
        h: Tensor,
        freqs_cis: Tensor,
        mask: Tensor | None = None,
        cache: Sequence[KVCache] | None = None,
        at: CacheSlice | None = None,
    ) -> Tensor:
        for i, layer in enumerate(self):
            h = layer(h, freqs_cis, mask, None if cache is None else cache[i], at)
        return h


class Transformer(nn.Module):
    """Llama 3. The state dict's names are those of Meta's checkpoints.

    `model(tokens)` is a causal model over whole sequences that can be trained.
    `model(tokens, start_pos)` continues the model's own cache, as Meta's does, without gradients.
    Others bring a cache: `model.hidden(tokens, start_pos, model.new_cache(...))`.
    """

    def __init__(self, params: ModelArgs):
        super().__init__()
        ranks = tensor_parallel.size()
        if params.vocab_size < 1:
            raise ValueError("set ModelArgs.vocab_size: a model needs to know its vocabulary")
        if ranks not in rank_counts(params):
            raise ValueError(
                f"{ranks} ranks cannot split {params.n_heads} heads, {params.kv_heads} KV heads "
                f"and a feed-forward of {params.hidden_dim}; use one of {rank_counts(params)} ranks"
            )
        self.params = params
        self.vocab_size = params.vocab_size
        self.n_layers = params.n_layers
        share = vocabulary_share(params, ranks)
        self.tok_embeddings = nn.Embedding(share, params.dim, dtype=torch.float32)
        self.layers = Layers(TransformerBlock(i, params) for i in range(params.n_layers))
        self.norm = RMSNorm(params.dim, eps=params.norm_eps)
        self.output = plain_linear(params.dim, share)
        self.cache: list[KVCache] | None = None  # of `model(tokens, start_pos)` alone
        self.unused: Tensor | None  # ids without a token, which the engine never draws
        self.register_buffer("unused", None, persistent=False)
        # Not a buffer: `.to(torch.bfloat16)` would cast it and lose the imaginary part.
        self.freqs_cis = precompute_freqs_cis(
            params.head_dim,
            params.max_seq_len,
            params.rope_theta,
            params.use_scaled_rope,
            params.scale_factor,
        )

    def new_cache(self, max_batch: int, max_seq: int) -> list[KVCache]:
        """An empty KV cache of `max_batch` rows of `max_seq` positions for each layer.

        Raises:
            ValueError: the model was built for fewer positions.
        """
        if max_seq > len(self.freqs_cis):
            raise ValueError(
                f"a cache of {max_seq} positions needs a model built with max_seq_len >= {max_seq}"
            )
        args, w = self.params, self.norm.weight
        kv_heads = max(args.kv_heads // tensor_parallel.size(), 1)
        shape = (max_batch, max_seq, kv_heads, args.head_dim)
        with torch.inference_mode(False):  # else nobody outside inference mode could write it
            return [KVCache(shape, w.dtype, w.device) for _ in self.layers]

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, dim); each rank looks up its own part of the vocabulary."""
        if tensor_parallel.size() == 1:
            h: Tensor = self.tok_embeddings(tokens)
            return h
        n = self.tok_embeddings.num_embeddings
        local = tokens - tensor_parallel.rank() * n
        mine = (local >= 0) & (local < n)
        h = self.tok_embeddings(local.where(mine, 0)) * mine.unsqueeze(-1)
        return reduce_from_ranks(h)

    def locate(
        self,
        shape: tuple[int, int],
        start_pos: int | Tensor | None,
        cache: Sequence[KVCache] | None,
        cache_len: int | None = None,
        first_row: int = 0,
    ) -> tuple[Tensor, Tensor | None, CacheSlice | None]:
        """For B rows of T new ids: their rotations (freqs_cis), mask and slice of the cache.

        Args and errors: see `hidden`.
        """
        B, T = shape
        self.freqs_cis = self.freqs_cis.to(self.norm.weight.device)
        steps = torch.arange(T, device=self.freqs_cis.device)
        if (start_pos is None) != (cache is None):
            raise ValueError("give both a start_pos and a cache, or neither")
        if start_pos is None or cache is None:
            check_room(0, T, len(self.freqs_cis))
            return F.embedding(steps, self.freqs_cis), None, None
        max_batch, max_seq = cache[0].k.shape[:2]
        if first_row + B > max_batch:
            raise ValueError(
                f"{first_row + B} rows do not fit a cache of {max_batch}; make a larger one"
            )
        mask = None
        if isinstance(start_pos, Tensor) and start_pos.dim() > 0:
            cache_len = max_seq if cache_len is None else cache_len
            check_room(0, cache_len, max_seq)
            positions = start_pos.unsqueeze(1) + steps  # (B, T)
            mask = causal_mask(positions, cache_len)
        else:
            start = int(start_pos)
            cache_len = start + T
            check_room(start, cache_len, max_seq)
            positions = steps + start  # (T,)
            if start > 0 and T > 1:  # otherwise attention needs no mask
                mask = causal_mask(positions, cache_len)
        freqs_cis = F.embedding(positions, self.freqs_cis)
        rows = torch.arange(first_row, first_row + B, device=steps.device).unsqueeze(1)
        positions = positions.view(-1, T)
        counts = torch.arange(B + 1, dtype=torch.int32, device=steps.device)
        ends = (positions.select(1, T - 1).expand(B) + 1).int()
        at = CacheSlice(rows, positions, counts * T, counts * max_seq, ends, first_row, cache_len)
        return freqs_cis, mask, at

    def hidden(
        self,
        tokens: Tensor,
        start_pos: int | Tensor | None = None,
        cache: Sequence[KVCache] | None = None,
        cache_len: int | None = None,
        first_row: int = 0,
    ) -> Tensor:
        """All layers and the final norm: (B, T) ids -> (B, T, dim).

        Args:
            start_pos: the position of `tokens[:, 0]`: one for all rows, or (B,) int64, one a row.
                None: position 0 and no cache.
            cache: of `new_cache`, one a layer; the new positions are written to it.
            cache_len: how many cached positions to read where `start_pos` is a tensor, at least
                max(start_pos) + T; None reads the whole cache.
            first_row: the cache row of `tokens[0]`; the next rows follow it.

        Raises:
            ValueError: more rows or positions than the cache has.
        """
        B, T = tokens.shape
        freqs_cis, mask, at = self.locate((B, T), start_pos, cache, cache_len, first_row)
        h = self.layers(self.embed(tokens), freqs_cis, mask, cache, at)
        out: Tensor = self.norm(h)
        return out

    def logits(self, h: Tensor) -> Tensor:
        """(..., dim) normed hidden states -> (..., V) fp32."""
        logits = gather_from_ranks(self.output(copy_to_ranks(h)))
        return logits.narrow(-1, 0, self.vocab_size).float()  # without the padding of the last rank

    def forward(self, tokens: Tensor, start_pos: int | Tensor | None = None) -> Tensor:
        """Logits of every position.

        Args:
            tokens: (B, T) int64.
            start_pos: None runs whole sequences without a cache, with gradients. Otherwise the
                number of positions already cached (or (B,) of them), as in Meta's code. The first
                such call makes a cache of params.max_batch_size x params.max_seq_len.

        Returns:
            (B, T, V) fp32.
        """
        if start_pos is not None and self.cache is None:
            self.cache = self.new_cache(self.params.max_batch_size, self.params.max_seq_len)
        with torch.set_grad_enabled(start_pos is None and torch.is_grad_enabled()):
            cache = None if start_pos is None else self.cache
            return self.logits(self.hidden(tokens, start_pos, cache))


def check_room(start: int, end: int, room: int) -> None:
    """Raise a ValueError unless positions `start` to `end` - 1 are within `room`."""
    if not 0 <= start <= end <= room:
        raise ValueError(f"positions {start} to {end - 1} are outside max_seq_len {room}")
