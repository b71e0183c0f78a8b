"""Bytes that one rank of a model stores, reads and sends, computed from the sizes of the model.

Needs no weights, no device and no torch. Weights and KV cache are exact; activations are an
estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llama.common.dtype_names import SIZES, full_name
from llama.distributed.sharding import Sizes, rank_shapes
from llama.layers.schemes import BLOCK, EXACT_SCORES, INT8, Scheme, possible_ranks

PREFILL_CHUNK = 512  # tokens of a prefill step of `Engine`
# Per id of the vocabulary, to sample: logits, probabilities, both sorted, sums, ids of int64.
SAMPLING_BYTES = 32


@dataclass(frozen=True)
class Footprint:
    """Memory and traffic of one rank, when `ranks` ranks share a model.

    Attributes:
        tied: the output's weights are those of the embedding.
        dtype: of plain weights, KV cache and activations, such as "bf16" or "bfloat16".
        scheme: how the linears' weights are stored; None: they are plain.

    Raises:
        ValueError: unknown dtype, or the model cannot be shared by so many ranks.
    """

    args: Sizes
    tied: bool
    ranks: int = 1
    dtype: str = "bf16"
    scheme: Scheme | None = None

    def __post_init__(self) -> None:
        _ = self.itemsize  # raises for an unknown name
        possible = self.possible_ranks()
        if type(self.ranks) is not int or self.ranks not in possible:
            scheme = f" in {self.scheme.name}" if self.scheme else ""
            raise ValueError(
                f"{self.ranks!r} ranks cannot share this model{scheme}; use one of {possible}"
            )

    def possible_ranks(self) -> list[int]:
        """Numbers of ranks that can share the model."""
        return possible_ranks(self.args, self.scheme)

    @property
    def itemsize(self) -> int:
        """Bytes of one number in `dtype`."""
        if self.dtype == "auto":
            raise ValueError("dtype 'auto' has no size; name a dtype, such as bf16")
        return SIZES[full_name(self.dtype)]

    def weights(self) -> dict[str, int]:
        """Bytes of the weights by kind; tied weights are counted as the embedding."""
        sums = dict.fromkeys(("embedding", "attention", "feed_forward", "norms", "output"), 0)
        for name, shape in rank_shapes(self.args, self.ranks).items():
            in_layer = name.startswith("layers.")
            kind = name.split(".")[2 if in_layer else 0]
            kind = "norms" if "norm" in kind else kind.replace("tok_embeddings", "embedding")
            if kind == "output" and self.tied and self.scheme is None:
                continue
            times = self.args.n_layers if in_layer else 1
            sums[kind] += times * self._weight_bytes(kind, shape)
        return sums

    def _weight_bytes(self, kind: str, shape: tuple[int, ...]) -> int:
        """Bytes of one weight, plain or quantized."""
        if self.scheme is None or kind in ("embedding", "norms"):
            return math.prod(shape) * self.itemsize
        return self.scheme.form(kind).bytes(shape[0], shape[1])

    def cache_token(self) -> int:
        """Bytes of the KV cache for one token."""
        heads = max(self.args.kv_heads // self.ranks, 1)
        return 2 * self.args.n_layers * heads * self.args.head_dim * self.itemsize

    def cache(self, batch: int, context: int) -> int:
        """Bytes that `Transformer.new_cache(batch, context)` allocates."""
        return batch * context * self.cache_token()

    def rotary(self, context: int) -> int:
        """Bytes of `freqs_cis`: one complex64 per position and rotary pair."""
        return context * self.args.head_dim // 2 * 8

    def activations(self, batch: int, rows: int, context: int) -> int:
        """Estimated peak of bytes in a forward pass, beside weights and cache.

        It is the maximum over norm, rotation of queries and keys, attention and feed-forward, plus
        the mask and one unpacked block of a quantized weight; or the sampling of an id for each
        row, if that is more. Attention stores up to `EXACT_SCORES` scores in fp32, and none in half
        precision, where it is fused.

        Args:
            batch: rows of the cache, each of which may sample an id.
            rows: new positions in the pass: `batch` in a decode step.
            context: cached positions that each of them reads.
        """
        args, s, dim = self.args, self.itemsize, self.args.dim
        wide = s >= 4  # otherwise norms and rotations are computed in fp32 copies
        q, hidden = dim // self.ranks, args.hidden_dim // self.ranks
        kv = max(args.kv_heads // self.ranks, 1) * args.head_dim
        norm = (2 * s + 8) * dim
        rotation = 2 * s * dim + s * (q + 2 * kv) + (4 if wide else 8 + s) * q
        feed_forward = s * (3 * dim + 4 * hidden)
        attention = rows * (2 * s * (dim + q + kv) + (1 if wide else s) * context)
        if wide:  # one layer's keys are copied too if there are several rows
            scores = min(rows * args.n_heads // self.ranks * context, EXACT_SCORES)
            attention += batch * context * kv * s + 8 * scores
        unpacked = (
            (0 if self.scheme is None else s if self.scheme.layers is INT8 else 16)
            * BLOCK
            * max(dim, hidden)
        )
        vocabulary = rank_shapes(args, self.ranks)["output.weight"][0]
        if self.scheme and full_name(self.dtype) == "float16":  # int8 is unpacked as a whole
            unpacked = max(unpacked, 8 * dim * max(vocabulary, hidden))
        layer = max(rows * max(norm, rotation, feed_forward), attention)
        sampling = rows * dim * s + batch * args.vocab_size * SAMPLING_BYTES
        return max(layer + rows * context + unpacked, sampling + unpacked)

    def memory(self, batch: int, context: int) -> dict[str, int]:
        """Bytes by purpose. The engine prefills and decodes one after the other, not at once."""
        chunk = max(min(PREFILL_CHUNK, batch * context), batch)
        return {
            "weights": sum(self.weights().values()),
            "kv_cache": self.cache(batch, context),
            "rotary_table": self.rotary(context),
            "prefill_activations": self.activations(batch, chunk, context),
            "decode_activations": self.activations(batch, batch, context),
        }

    def needed(self, batch: int, context: int) -> int:
        """Peak of bytes."""
        parts = self.memory(batch, context)
        activations = max(parts.pop("prefill_activations"), parts.pop("decode_activations"))
        return sum(parts.values()) + activations

    def collectives(self) -> int:
        """Collectives per step: embedding, two per layer, logits, sampled ids."""
        return 2 * self.args.n_layers + 3 if self.ranks > 1 else 0

    def sent(self, positions: int = 1, outputs: int = 1) -> int:
        """Bytes that a rank sends with ring algorithms; by default per decoded token.

        An all-reduce of dim numbers, for the embedding and twice per layer, sends
        2 (n - 1) / n * dim numbers per rank and position; the all-gather of the logits sends n - 1
        parts per output. The sampled id is not counted.
        """
        n = self.ranks
        if n == 1:
            return 0
        summed = (2 * self.args.n_layers + 1) * self.args.dim * self.itemsize
        part = rank_shapes(self.args, n)["output.weight"][0] * self.itemsize
        return positions * (2 * (n - 1) * summed // n) + outputs * (n - 1) * part

    def flops(self, positions: int, pairs: int, outputs: int) -> int:
        """Operations of a rank in a forward pass; a multiplication and an addition are two.

        Counts the linears, and attention's scores and weighted sums. Norms, rotations, softmax and
        the dequantization of weights are left out.

        Args:
            positions: new tokens.
            pairs: pairs of a new token and a cached one that it reads, itself included.
            outputs: positions whose logits are computed.
        """
        shapes = rank_shapes(self.args, self.ranks)
        linears = [
            math.prod(s) for n, s in shapes.items() if n.startswith("layers.") and len(s) == 2
        ]
        heads = self.args.n_heads // self.ranks
        layer = 2 * positions * sum(linears) + 4 * pairs * heads * self.args.head_dim
        return self.args.n_layers * layer + 2 * outputs * math.prod(shapes["output.weight"])

    def read(self, batch: int, context: int) -> int:
        """Bytes that a decode step with full rows reads: cache, and weights but the embedding."""
        kinds = self.weights()
        if kinds["output"]:  # otherwise the embedding is read as the output
            del kinds["embedding"]
        return sum(kinds.values()) + self.cache(batch, context)
