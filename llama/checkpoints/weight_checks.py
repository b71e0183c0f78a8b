"""Checks of a checkpoint's weights: they open, have the right sizes, and are finite numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoints.source import Source
from llama.common.listing import listing
from llama.common.progress import progress
from llama.distributed.sharding import shard_dim

GET_AGAIN = "get or make it again"
ELEMENTS_AT_ONCE = 1 << 22  # weights are checked in pieces of this many elements: 16 MB in fp32


def check_weights(path: Path, open_source: Callable[[Path], Source]) -> list[str]:
    """Problems of the weights of the checkpoint at `path`, one line each with its remedy.

    Raises:
        ImportError: the extra that reads this layout is not installed.
    """
    try:
        source = open_source(path)
        names = list(source.shapes())
    except ImportError:
        raise
    except (ValueError, OSError) as e:
        return [_one_line(e if str(path) in str(e) else f"{path}: {e}")]
    except Exception as e:  # whatever a library raises for a damaged file
        return [_one_line(f"{path} cannot be opened ({type(e).__name__}: {e}); {GET_AGAIN}")]
    problems = []
    try:
        source.args()
    except (ValueError, TypeError) as e:
        remedy = "get params.json (or config.json) and weights of one release"
        problems.append(_one_line(f"{e}; {remedy}"))
    not_finite, unreadable = [], []
    if source.tied and "output.weight" in names:
        names.remove("output.weight")  # the same numbers as the embedding
    for name in progress(names, "checking weights", len(names), " tensors"):
        try:
            if not _is_finite(source, name):
                not_finite.append(name)
        except Exception as e:
            unreadable.append(f"{name} ({type(e).__name__}: {e})")
    for names, what in (
        (not_finite, "weights that are NaN or infinite"),
        (unreadable, "weights that cannot be read"),
    ):
        if names:
            problems.append(_one_line(f"{path} has {what}: {listing(names)}; {GET_AGAIN}"))
    return problems


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _is_finite(source: Source, name: str) -> bool:
    """Whether all numbers of a weight are finite, in each shard that stores it."""
    n, dim = source.n_shards, shard_dim(name) if "." in name else None
    shape = source.shapes()[name]
    if dim is None or dim >= len(shape):
        return all(_all_finite(source.read_replicated(name, rank, n)) for rank in range(n))
    size = shape[dim]
    # One shard's part is read without a copy. KV heads can be fewer than shards, and are small.
    whole = size % n or name.split(".")[-2] in ("wk", "wv")
    step = size if whole else size // n
    return all(_all_finite(source.read(name, dim, i, i + step)) for i in range(0, size, step or 1))


def _all_finite(w: Tensor) -> bool:
    """Whether all numbers of `w` are finite: NaN and infinity appear in minimum or maximum."""
    rows = max(ELEMENTS_AT_ONCE // max(w[0].numel() if w.dim() and len(w) else 1, 1), 1)
    for piece in w.split(rows) if w.dim() else [w]:
        if piece.numel():
            low, high = piece.float().aminmax()
            if not torch.isfinite(low) or not torch.isfinite(high):
                return False
    return True
