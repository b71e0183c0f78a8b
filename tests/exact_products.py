"""Comparisons with plain torch, and of ranks that have other columns, need x as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llama.layers import kernels


@contextmanager
def exact_products() -> Iterator[None]:
    """Without the integer products, which round blocks of x to 8 bits. Also a decorator."""
    if not kernels.load():
        yield
        return
    exact = [name for name in torch.ops.llama3.variants() if not name.endswith("-vnni")]
    torch.ops.llama3.use_variant(exact[0])
    try:
        yield
    finally:
        torch.ops.llama3.use_variant("")
