"""Names and sizes of floating-point dtypes. Imports no torch."""

from __future__ import annotations

SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}  # bytes of a number


def full_name(dtype: str) -> str:
    """ "bfloat16" for "bf16", "torch.bfloat16" or itself.

    Raises:
        ValueError: no floating-point dtype has this name.
    """
    name = SHORT_NAMES.get(dtype, dtype).removeprefix("torch.")
    if name not in SIZES:
        raise ValueError(f"unknown dtype {dtype!r}; use one of {['auto', *SHORT_NAMES, *SIZES]}")
    return name
