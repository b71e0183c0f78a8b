"""formats/params.py: feed-forward terms, compared with Meta's formula."""

from __future__ import annotations

import math
import random

import pytest

from llama.checkpoints.formats.params import ffn_terms
from llama.model import ModelArgs


def meta_hidden_dim(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """The width by the formula of Meta's FeedForward."""
    hidden = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return multiple_of * math.ceil(hidden / multiple_of)


def test_ffn_terms_give_the_exact_width() -> None:
    rng = random.Random(0)
    shapes = [(rng.randrange(2, 20000, 2), rng.randrange(1, 60000)) for _ in range(2000)]
    for dim, hidden in [(64, 173), (2, 1), (6, 2**31 - 1), (2**16, 1), (8192, 28673), *shapes]:
        multiple_of, multiplier = ffn_terms(dim, hidden)
        assert meta_hidden_dim(dim, multiple_of, multiplier) == hidden, (dim, hidden)
        ModelArgs(dim=dim, n_heads=1, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)


@pytest.mark.parametrize(
    ("dim", "hidden", "multiplier"),
    [
        (576, 1536, None),
        (2048, 8192, None),
        (3072, 8192, None),
        (4096, 11008, None),
        (4096, 14336, 1.3),
        (8192, 28672, 1.3),
        (16384, 53248, 1.2),
    ],
)
def test_ffn_terms_of_known_models(dim: int, hidden: int, multiplier: float | None) -> None:
    multiple_of, found = ffn_terms(dim, hidden)
    assert found == multiplier
    assert multiple_of in (256, 1024, 4096)
    assert meta_hidden_dim(dim, multiple_of, found) == hidden


@pytest.mark.parametrize(("dim", "hidden"), [(64, 0), (0, 64), (63, 64)])
def test_impossible_sizes(dim: int, hidden: int) -> None:
    with pytest.raises(ValueError, match=r"positive|even"):
        ffn_terms(dim, hidden)
