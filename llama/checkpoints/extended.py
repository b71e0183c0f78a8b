"""A checkpoint with more tokens than its files have: new rows of the embedding and of the output.

"mean": a new row is the mean of the old ones. A new token's logit is then the mean of the old
logits, so that `n` new tokens beside `V` old ones take at most n / (V + n) of the probability
(Jensen), and no old token's loss rises by more than ln(1 + n / V) nats.

"parts": a new row is the mean of the rows of the old tokens that it is merged from. The model
begins with a much lower loss, and without that bound.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from llama.checkpoints.formats.hf_tokenizer_export import recover_merges
from llama.checkpoints.open import explicit_spec, find_vocabulary, open_tokenizer
from llama.checkpoints.source import Source
from llama.distributed.sharding import VOCABULARY
from llama.tokenizer import Tokenizer

INITIAL = ("mean", "parts")
ROWS = 8192  # of a weight that are added at a time


class ExtendedSource(Source):
    """`base` with `tokens`, which are not its own yet.

    Args:
        tokens: {bytes: id}; the ids are consecutive and begin with `first_new_id`.
        initial: of INITIAL, what new rows begin as.

    Raises:
        FileNotFoundError, ValueError: see `open_tokenizer`.
    """

    replaces_vocabulary = True

    def __init__(self, base: Source, tokens: dict[bytes, int], initial: str = "mean"):
        self.base, self.tokens = base, tokens
        self.path, self.layout, self.n_shards = base.path, base.layout, base.n_shards
        self.tied, self.quantization = base.tied, base.quantization
        self.params = base.params | {"vocab_size": max(tokens.values()) + 1}
        self._tokenizer = open_tokenizer(base)
        self._parts = old_parts(self._tokenizer.ranks, tokens) if initial == "parts" else None
        self._new: dict[str, Tensor] = {}  # rows of each weight, of the ids from the old rows on

    @property
    def context(self) -> int:
        return self.base.context

    def shapes(self) -> dict[str, tuple[int, ...]]:
        rows = self.params["vocab_size"]
        return {
            name: (rows, *shape[1:]) if name in VOCABULARY else shape
            for name, shape in self.base.shapes().items()
        }

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        if name not in VOCABULARY:
            return self.base.read(name, dim, start, stop)
        old = self.base.read(name)
        if name not in self._new:
            mean = mean_row(old, self._tokenizer.unused_ids)
            rows = mean.repeat(self.params["vocab_size"] - len(old), 1)
            for token, parts in (self._parts or {}).items():
                rows[self.tokens[token] - len(old)] = old[parts].double().mean(0)
            self._new[name] = rows.to(old.dtype)
        whole = torch.cat([old, self._new[name]])
        return whole.narrow(dim, start, (whole.shape[dim] if stop is None else stop) - start)

    def read_replicated(self, name: str, rank: int, size: int) -> Tensor:
        return self.base.read_replicated(name, rank, size)

    def stop_ids(self) -> list[int]:
        return self.base.stop_ids()

    def vocabulary(self) -> tuple[bytes, dict[str, Any]]:
        """See `Source.vocabulary`. All that follows from the old ranks is in the sidecar."""
        found = find_vocabulary(self.base)
        assert found is not None  # otherwise it could not be opened
        ranks, sidecar = found
        tokenizer = self._tokenizer
        used = {*tokenizer.ranks.values(), *tokenizer.special_tokens.values()}
        spec = explicit_spec(self.base, ranks, sidecar)
        spec["unused_ids"] = [i for i in range(min(self.tokens.values())) if i not in used]
        lines = (base64.b64encode(token) + b" %d\n" % i for token, i in self.tokens.items())
        return ranks.rstrip(b"\r\n") + b"\n" + b"".join(lines), spec


def mean_row(w: Tensor, unused: Set[int]) -> Tensor:
    """The mean of the rows of `w` (V, D) that are not `unused`, in double precision: (D,).

    Raises:
        ValueError: it is not finite.
    """
    total = torch.zeros(w.shape[1], dtype=torch.float64)
    used = torch.tensor([i not in unused for i in range(len(w))])
    for rows, chosen in zip(w.split(ROWS), used.split(ROWS), strict=True):
        total += rows[chosen].sum(0, dtype=torch.float64)
    mean = total / used.sum()
    if not mean.isfinite().all():
        raise ValueError("the embedding has NaN or infinite numbers; run `llama3 verify`")
    return mean


def old_parts(ranks: Mapping[bytes, int], new: Mapping[bytes, int]) -> dict[bytes, list[int]]:
    """{new token: ids of the old tokens that are merged to it}."""
    found: dict[bytes, list[int]] = {}
    for left, right in recover_merges({**ranks, **new}):
        if left + right in new:
            found[left + right] = [
                i for part in (left, right) for i in found.get(part) or [ranks[part]]
            ]
    return found


def first_new_id(source: Source, tokenizer: Tokenizer) -> int:
    """The lowest id above all rows and all tokens of a checkpoint."""
    return max(int(source.params["vocab_size"]), tokenizer.n_words)
