"""Floating-point dtypes by name."""

from __future__ import annotations

import torch

from llama.common.dtype_names import SHORT_NAMES as SHORT_NAMES
from llama.common.dtype_names import full_name

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The torch dtype of "bfloat16", "bf16" or torch.bfloat16; None for "auto" and None.

    Raises:
        TypeError: it is neither a text nor a torch dtype.
        ValueError: no floating-point dtype has this name.
    """
    if dtype is None or dtype == "auto":
        return None
    if isinstance(dtype, str):
        return DTYPES[full_name(dtype)]
    if dtype not in DTYPES.values():
        names = ", ".join(map(str, DTYPES.values()))
        raise TypeError(f"dtype must be one of {names}, or its name, not {dtype!r}")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch.", such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
