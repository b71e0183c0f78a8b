"""The Llama 3 transformer: token ids in, logits out. Knows nothing about files, text or sampling.

Shapes: B rows, T new positions a row, S cached positions read, V vocabulary, D head_dim,
H / K this rank's query / key-value heads. Names are those of Meta's checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.args import ModelArgs
from llama.attention import (
    CacheSlice,
    KVCache,
    causal_mask,
    grouped_attention,
    plain_attention,
    repeat_kv,
)
from llama.distributed import tensor_parallel
from llama.distributed.sharding import rank_counts, vocabulary_share
from llama.rope import apply_rotary_emb, precompute_freqs_cis

__all__ = [
    "Attention", "FeedForward", "KVCache", "ModelArgs", "RMSNorm", "Transformer",
    "TransformerBlock", "apply_rotary_emb", "grouped_attention", "plain_attention",
    "precompute_freqs_cis", "repeat_kv",
]  # fmt: skip


class RMSNorm(nn.Module):
    """Root-mean-square norm, arXiv:1910.07467: computed in fp32, cast, then times the weight."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x.float()).type_as(x) * self.weight


def project(x: Tensor, *linears: nn.Module) -> list[Tensor]:
    """What each linear makes of x."""
    return [linear(x) for linear in linears]


class Attention(nn.Module):
    """Grouped-query attention; this rank holds its share of the heads."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        ranks = tensor_parallel.size()
        self.n_local_heads = args.n_heads // ranks
        self.n_local_kv_heads = max(args.kv_heads // ranks, 1)  # several ranks may share a head
        self.head_dim = args.head_dim
        self.project = project
        self.rotate = apply_rotary_emb
        self.attend = grouped_attention
        self.cache: KVCache | None = None

        q_dim, kv_dim = self.n_local_heads * self.head_dim, self.n_local_kv_heads * self.head_dim
        self.wq = nn.Linear(args.dim, q_dim, bias=False)
        self.wk = nn.Linear(args.dim, kv_dim, bias=False)
        self.wv = nn.Linear(args.dim, kv_dim, bias=False)
        self.wo = nn.Linear(q_dim, args.dim, bias=False)

    def forward(
        self,
        x: Tensor,
        freqs_cis: Tensor,
        mask: Tensor | None = None,
        at: CacheSlice | None = None,
    ) -> Tensor:
        B, T, _ = x.shape
        x = tensor_parallel.copy_to_ranks(x)
        xq, xk, xv = self.project(x, self.wq, self.wk, self.wv)
        xq = xq.view(B, T, self.n_local_heads, self.head_dim)
        xk = xk.view(B, T, self.n_local_kv_heads, self.head_dim)
        xv = xv.view(B, T, self.n_local_kv_heads, self.head_dim)
        xq, xk = self.rotate(xq, xk, freqs_cis)
        if at is not None:
            assert self.cache is not None
            xk, xv = self.cache.update(xk, xv, at)
        positions = None if at is None else at.positions
        out = self.attend(xq, xk, xv, mask, positions).reshape(B, T, -1)
        return tensor_parallel.reduce_from_ranks(self.wo(out))


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b, arXiv:2002.05202."""
    return F.silu(a) * b


class FeedForward(nn.Module):
    """SwiGLU, arXiv:2002.05202: w2(silu(w1 x) * w3 x); this rank holds a share of the width."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        ranks = tensor_parallel.size()
        hidden = args.hidden_dim // ranks
        self.project = project
        self.gate = swiglu
        self.w1 = nn.Linear(args.dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = tensor_parallel.copy_to_ranks(x)
        return tensor_parallel.reduce_from_ranks(
            self.w2(self.gate(*self.project(x, self.w1, self.w3)))
        )


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
        at: CacheSlice | None = None,
    ) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis, mask, at)
        out: Tensor = h + self.feed_forward(self.ffn_norm(h))
        return out


class Transformer(nn.Module):
    """Llama 3. The state dict's names are those of Meta's checkpoints.

    `model(tokens)` is a causal model over whole sequences that can be trained.
    `model(tokens, start_pos)` continues a cache, as Meta's does, and computes no gradients.
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
        self.tok_embeddings = nn.Embedding(share, params.dim)
        self.layers = nn.ModuleList(TransformerBlock(i, params) for i in range(params.n_layers))
        self.norm = RMSNorm(params.dim, eps=params.norm_eps)
        self.output = nn.Linear(params.dim, share, bias=False)
        self.cache_owner: object = None  # who knows what the cache holds; see engine.py
        # `hidden` for one position of each of the cache's first rows; see compilation.py
        self.compiled: Callable[[Tensor, Tensor, int], Tensor] | None = None
        # Not a buffer: `.to(torch.bfloat16)` would cast it and lose the imaginary part.
        self.freqs_cis = precompute_freqs_cis(
            params.head_dim,
            params.max_seq_len,
            params.rope_theta,
            params.use_scaled_rope,
            params.scale_factor,
        )

    def attentions(self) -> Iterator[Attention]:
        """The attention of every layer, in order."""
        return (module for module in self.modules() if isinstance(module, Attention))

    def setup_cache(self, max_batch: int, max_seq: int) -> None:
        """Install an empty KV cache of `max_batch` rows of `max_seq` positions in every layer."""
        if max_seq > len(self.freqs_cis):
            raise ValueError(
                f"a cache of {max_seq} positions needs a model built with max_seq_len >= {max_seq}"
            )
        self.cache_owner = None
        with torch.inference_mode(False):  # else nobody outside inference mode could write it
            for a in self.attentions():
                shape = (max_batch, max_seq, a.n_local_kv_heads, a.head_dim)
                a.cache = KVCache(shape, like=self.norm.weight)

    def caches(self) -> Iterator[KVCache]:
        """The installed cache of every layer, in order."""
        for a in self.attentions():
            assert a.cache is not None
            yield a.cache

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) ids -> (B, T, dim); each rank looks up its own part of the vocabulary."""
        if tensor_parallel.size() == 1:
            h: Tensor = self.tok_embeddings(tokens)
            return h
        n = self.tok_embeddings.num_embeddings
        local = tokens - tensor_parallel.rank() * n
        mine = (local >= 0) & (local < n)
        h = self.tok_embeddings(local.where(mine, 0)) * mine.unsqueeze(-1)
        return tensor_parallel.reduce_from_ranks(h)

    def hidden(
        self,
        tokens: Tensor,
        start_pos: int | Tensor | None = None,
        cache_len: int | None = None,
        first_row: int = 0,
        block: Callable[..., Tensor] = TransformerBlock.__call__,
    ) -> Tensor:
        """All layers and the final norm: (B, T) ids -> (B, T, dim).

        Args:
            start_pos: the position of `tokens[:, 0]`: one for all rows, or (B,) int64, one a row.
                None: position 0 and no cache.
            cache_len: how many cached positions to read where `start_pos` is a tensor, at least
                max(start_pos) + T; None reads the whole cache.
            first_row: the cache row of `tokens[0]`; the next rows follow it.
            block: runs a layer: block(layer, h, freqs_cis, mask, at).
        """
        B, T = tokens.shape
        if start_pos is not None and (not isinstance(start_pos, Tensor) or start_pos.dim() == 0):
            start_pos = int(start_pos)
        steps = torch.arange(T, device=tokens.device)
        mask, at = None, None
        if start_pos is None:
            self._check_room(0, T, len(self.freqs_cis))
            positions = steps
        else:
            cache_len = self._span(start_pos, cache_len, first_row + B, T)
            if isinstance(start_pos, int):
                positions = steps + start_pos
                causal_or_single = start_pos == 0 or T == 1  # attention needs no mask for these
            else:
                positions = start_pos.unsqueeze(1) + steps  # (B, T)
                causal_or_single = False
            mask = None if causal_or_single else causal_mask(positions, cache_len)
            rows = torch.arange(first_row, first_row + B, device=tokens.device).unsqueeze(1)
            at = CacheSlice(rows, positions.view(-1, T), first_row, cache_len)
        h = self.embed(tokens)
        self.freqs_cis = self.freqs_cis.to(h.device)
        freqs_cis = F.embedding(positions, self.freqs_cis)
        for layer in self.layers:
            h = block(layer, h, freqs_cis, mask, at)
        out: Tensor = self.norm(h)
        return out

    def logits(self, h: Tensor) -> Tensor:
        """(..., dim) normed hidden states -> (..., V) fp32."""
        logits = tensor_parallel.gather_from_ranks(self.output(tensor_parallel.copy_to_ranks(h)))
        return logits.narrow(-1, 0, self.vocab_size).float()  # without the padding of the last rank

    def forward(self, tokens: Tensor, start_pos: int | Tensor | None = None) -> Tensor:
        """Logits of every position.

        Args:
            tokens: (B, T) int64.
            start_pos: None runs whole sequences without a cache, with gradients. Otherwise the
                number of positions already cached (or (B,) of them), as in Meta's code; the first
                such call installs a cache of params.max_batch_size x params.max_seq_len unless
                `setup_cache` did.

        Returns:
            (B, T, V) fp32.
        """
        if start_pos is not None:
            self.cache_owner = None  # whoever else counted on the cache's contents
        with torch.set_grad_enabled(start_pos is None and torch.is_grad_enabled()):
            return self.logits(self.hidden(tokens, start_pos))

    def _span(self, start_pos: int | Tensor, cache_len: int | None, rows: int, T: int) -> int:
        """How many cached positions to read; refuses what the cache has no room for."""
        attention = next(self.attentions())
        if attention.cache is None:
            self.setup_cache(self.params.max_batch_size, self.params.max_seq_len)
        assert attention.cache is not None
        max_batch, max_seq = attention.cache.k.shape[:2]
        if max_batch < rows:
            raise ValueError(f"{rows} rows do not fit a cache of {max_batch}; setup_cache a larger")
        if isinstance(start_pos, int):
            cache_len = start_pos + T
            self._check_room(start_pos, cache_len, max_seq)
            return cache_len
        cache_len = max_seq if cache_len is None else cache_len
        self._check_room(0, cache_len, max_seq)
        return cache_len

    @staticmethod
    def _check_room(start: int, end: int, room: int) -> None:
        if not 0 <= start <= end <= room:
            raise ValueError(f"positions {start} to {end - 1} are outside max_seq_len {room}")
