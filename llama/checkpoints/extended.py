"""A checkpoint with more tokens than its files have: new rows of the embedding and of the output.

"mean": a new row is the mean of the old ones. A new token's logit is then the mean of the old
logits, so that `n` new tokens beside `V` old ones take at most n / (V + n) of the probability
(Jensen), and no old token's loss rises by more than ln(1 + n / V) nats.

"parts": a new row is the mean of the rows of the old tokens that it is merged from. The model
begins with a much lower loss, and without that bound.

"shares": as "parts", and a multiple of the model's mean state is added to each row of the output,
so that in this state a new token has its share of the text as its probability.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama.checkpoints.formats.hf_tokenizer_export import recover_merges
from llama.checkpoints.open import explicit_spec, find_vocabulary, open_tokenizer
from llama.checkpoints.source import Source
from llama.distributed.sharding import VOCABULARY
from llama.tokenizer import Tokenizer

INITIAL = ("mean", "parts", "shares")
ROWS = 8192  # of a weight that are added at a time


class Shares(NamedTuple):
    """How often tokens occur in a text, and the model's mean state there.

    Attributes:
        state: (D,) float64, the mean of the normed states before the output.
        log_odds: (n,) float64, for each new token: the logarithm of its count, divided by the count
            of all old tokens together.
    """

    state: Tensor
    log_odds: Tensor


class ExtendedSource(Source):
    """`base` with `tokens`, which are not its own yet.

    Args:
        tokens: {bytes: id}; the ids are consecutive and begin with `first_new_id`.
        initial: of INITIAL, what new rows begin as.
        shares: for "shares", in the order of the new ids.

    Raises:
        FileNotFoundError, ValueError: see `open_tokenizer`.
    """

    replaces_vocabulary = True

    def __init__(
        self,
        base: Source,
        tokens: dict[bytes, int],
        initial: str = "mean",
        shares: Shares | None = None,
    ):
        self.base, self.tokens = base, tokens
        self.path, self.layout, self.n_shards = base.path, base.layout, base.n_shards
        self.tied, self.quantization = base.tied, base.quantization
        self.params = base.params | {"vocab_size": max(tokens.values()) + 1}
        self._tokenizer = open_tokenizer(base)
        self._parts = old_parts(self._tokenizer.ranks, tokens) if initial != "mean" else {}
        self._shares = shares
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
            self._new[name] = self._new_rows(name, old).to(old.dtype)
        whole = torch.cat([old, self._new[name]])
        return whole.narrow(dim, start, (whole.shape[dim] if stop is None else stop) - start)

    def _new_rows(self, name: str, old: Tensor) -> Tensor:
        """Rows (n, D) of the weight `name`, whose others are `old`, in double precision."""
        unused = self._tokenizer.unused_ids
        rows = mean_row(old, unused).repeat(self.params["vocab_size"] - len(old), 1)
        for token, parts in self._parts.items():
            rows[self.tokens[token] - len(old)] = old[parts].double().mean(0)
        if self._shares is not None and (self.tied or name == "output.weight"):
            first = min(self.tokens.values()) - len(old)  # after rows without a token
            rows[first:] = shifted_rows(rows[first:], old, unused, self._shares)
        return rows

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


def shifted_rows(rows: Tensor, old: Tensor, unused: Set[int], shares: Shares) -> Tensor:
    """`rows` (n, D) plus multiples of `shares.state`, in which their probabilities are the shares.

    Args:
        old: (V, D), the other rows of the output; those of `unused` ids do not count.
    """
    used = torch.tensor([i not in unused for i in range(len(old))])
    state = shares.state
    logits = torch.cat([part.double() @ state for part in old.split(ROWS)])
    wanted = logits[used].logsumexp(0) + shares.log_odds
    return rows + ((wanted - rows @ state) / state.dot(state)).unsqueeze(1) * state


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
