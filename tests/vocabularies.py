"""Small tokenizers, and tokenizers with more tokens."""

from __future__ import annotations

import base64
from collections.abc import Iterable

from llama.text.rank_file import default_spec
from llama.tokenizer import Tokenizer


def rank_file(ranks: dict[bytes, int]) -> bytes:
    """The content of a tokenizer.model."""
    return b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in ranks.items())


def tokenizer_of_bytes(more: Iterable[bytes] = ()) -> Tokenizer:
    """256 bytes and `more` tokens, then Llama 3's 256 special tokens."""
    tokens = [*(bytes([b]) for b in range(256)), *more]
    ranks = {token: i for i, token in enumerate(tokens)}
    return Tokenizer.from_vocabulary(rank_file(ranks), {}, "bytes")


def extended(tokenizer: Tokenizer, new: dict[bytes, int]) -> Tokenizer:
    """`tokenizer` with new tokens."""
    first = max(tokenizer.ranks.values()) + 1
    spec = default_spec("llama3", first) | {"unused_ids": sorted(tokenizer.unused_ids)}
    return Tokenizer.from_vocabulary(rank_file(tokenizer.ranks | new), spec, "longer")
