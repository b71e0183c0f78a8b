"""What one rank of a model holds, reads and sends, in bytes. Arithmetic: no weights, no device.

Weights and cache are exact; activations are an estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llama.distributed.sharding import rank_shapes
from llama.layers.attention import EXACT_SCORES
from llama.layers.quantization import BLOCK, GROUPS, TILE
from llama.layers.quantized_linear import check_scheme, possible_ranks
from llama.model import ModelArgs

DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
PREFILL_CHUNK = 512  # as `Engine` has it
# Drawing an id over the whole vocabulary: logits, probabilities, both sorted, sums, ids of int64.
DRAW_BYTES = 32


@dataclass(frozen=True)
class Footprint:
    """One of `ranks` ranks of a model, as it would be built.

    Attributes:
        tied: the output's weights are the embedding's.
        dtype: "bf16", "fp16" or "fp32": of weights that are not quantized, cache, activations.
        quantize, group: "int8", "int4" or None, and int4's groups; see `linears.quantized`.

    Raises:
        ValueError: it cannot be built so.
    """

    args: ModelArgs
    tied: bool
    ranks: int = 1
    dtype: str = "bf16"
    quantize: str | None = None
    group: int = GROUPS[0]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"unknown dtype {self.dtype!r}; use one of {list(DTYPE_BYTES)}")
        if self.quantize is not None:
            check_scheme(self.quantize, self.group)
        possible = self.possible_ranks()
        if type(self.ranks) is not int or self.ranks not in possible:
            scheme = f" in {self.quantize}" if self.quantize else ""
            raise ValueError(
                f"{self.ranks!r} ranks cannot share this model{scheme}; use one of {possible}"
            )

    def possible_ranks(self) -> list[int]:
        return possible_ranks(self.args, self.quantize, self.group)

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]

    def weights(self) -> dict[str, int]:
        """Bytes by kind, as the model's modules hold them; tied weights are the embedding's."""
        sums = dict.fromkeys(("embedding", "attention", "feed_forward", "norms", "output"), 0)
        for name, shape in rank_shapes(self.args, self.ranks).items():
            in_layer = name.startswith("layers.")
            kind = name.split(".")[2 if in_layer else 0]
            kind = "norms" if "norm" in kind else kind.replace("tok_embeddings", "embedding")
            if kind == "output" and self.tied and self.quantize is None:
                continue
            times = self.args.n_layers if in_layer else 1
            sums[kind] += times * self._held(kind, shape)
        return sums

    def _held(self, kind: str, shape: tuple[int, ...]) -> int:
        """Bytes of one weight: plain, as `Int8Linear` or as `Int4Linear`."""
        if self.quantize is None or kind in ("embedding", "norms"):
            return math.prod(shape) * self.itemsize
        rows, columns = shape
        if self.quantize == "int8" or kind == "output":
            return rows * (columns + 4)  # codes, and a scale in fp32
        padded = -(-rows // TILE) * TILE
        return padded * (columns // 2 + columns // self.group * 4)  # codes; scale and zero in bf16

    def cache_token(self) -> int:
        """Bytes of keys and values of one position of one row."""
        heads = max(self.args.kv_heads // self.ranks, 1)
        return 2 * self.args.n_layers * heads * self.args.head_dim * self.itemsize

    def cache(self, batch: int, context: int) -> int:
        """Bytes that `setup_cache(batch, context)` reserves."""
        return batch * context * self.cache_token()

    def rotary(self, context: int) -> int:
        """Bytes of the table of rotations: complex64, one a position and pair."""
        return context * self.args.head_dim // 2 * 8

    def activations(self, batch: int, rows: int, context: int) -> int:
        """Estimate of the most that a pass holds at once, beside weights and cache.

        The largest of: a norm, the rotation of queries and keys, attention, the feed-forward; with
        the mask and one unpacked block of a quantized weight. Or the draw of an id for each row.
        Scores are counted in fp32, where attention holds up to `EXACT_SCORES` of them; in half
        precision it is fused and holds none.

        Args:
            batch: rows of the cache, all of which may draw an id.
            rows: positions of the pass: `batch` in a decode step.
            context: positions that each reads.
        """
        args, s, dim = self.args, self.itemsize, self.args.dim
        wide = s == 4  # else norms and rotations are computed in copies of fp32
        q, hidden = dim // self.ranks, args.hidden_dim // self.ranks
        kv = max(args.kv_heads // self.ranks, 1) * args.head_dim
        norm = (2 * s + 8) * dim
        rotation = 2 * s * dim + s * (q + 2 * kv) + (4 if wide else 8 + s) * q
        feed_forward = s * (3 * dim + 4 * hidden)
        attention = rows * (2 * s * (dim + q + kv) + (1 if wide else s) * context)
        if wide:  # one layer's keys are copied too, where there are several rows
            scores = min(rows * args.n_heads // self.ranks * context, EXACT_SCORES)
            attention += batch * context * kv * s + 8 * scores
        unpacked = {None: 0, "int8": s, "int4": 16}[self.quantize] * BLOCK * max(dim, hidden)
        vocabulary = rank_shapes(args, self.ranks)["output.weight"][0]
        if self.quantize and self.dtype == "fp16":  # int8 weights are made plain as a whole
            unpacked = max(unpacked, 8 * dim * max(vocabulary, hidden))
        layer = max(rows * max(norm, rotation, feed_forward), attention)
        drawing = rows * dim * s + batch * args.vocab_size * DRAW_BYTES
        return max(layer + rows * context + unpacked, drawing + unpacked)

    def memory(self, batch: int, context: int) -> dict[str, int]:
        """Bytes by purpose; a step of the engine prefills and decodes one after the other."""
        chunk = max(min(PREFILL_CHUNK, batch * context), batch)
        return {
            "weights": sum(self.weights().values()),
            "kv_cache": self.cache(batch, context),
            "rotary_table": self.rotary(context),
            "prefill_activations": self.activations(batch, chunk, context),
            "decode_activations": self.activations(batch, batch, context),
        }

    def needed(self, batch: int, context: int) -> int:
        """Bytes at the worst moment."""
        parts = self.memory(batch, context)
        activations = max(parts.pop("prefill_activations"), parts.pop("decode_activations"))
        return sum(parts.values()) + activations

    def collectives(self) -> int:
        """In a step: one for the embedding, two a layer, one for the logits, one for drawn ids."""
        return 2 * self.args.n_layers + 3 if self.ranks > 1 else 0

    def sent(self) -> int:
        """Bytes that a rank sends for each token that is decoded, by ring algorithms.

        For the embedding and twice a layer, dim numbers are summed over the n ranks, for which a
        rank sends 2 (n - 1) / n of them. Gathering logits, it passes n - 1 times a rank's part on.
        The drawn id itself is not counted.
        """
        n = self.ranks
        if n == 1:
            return 0
        summed = (2 * self.args.n_layers + 1) * self.args.dim * self.itemsize
        part = rank_shapes(self.args, n)["output.weight"][0] * self.itemsize
        return 2 * (n - 1) * summed // n + (n - 1) * part

    def read(self, batch: int, context: int) -> int:
        """Bytes that a decode step of full rows reads: all weights but the embedding, the cache."""
        kinds = self.weights()
        if kinds["output"]:  # else the embedding is read as the output
            del kinds["embedding"]
        return sum(kinds.values()) + self.cache(batch, context)
