"""What a benchmark may be asked for. Each check raises a ValueError that names the flag."""

from __future__ import annotations

from benchmarks.random_checkpoint import SHAPES

DTYPES = ("bfloat16", "float16", "float32")
LEAST = {"new": 2, "length": 2, "context": 0}


def check_model(shape: str, dtype: str, quantize: str | None = None) -> None:
    """Names of a shape, a dtype and a scheme."""
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; use one of {', '.join(SHAPES)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f"unknown scheme {quantize!r}; use int8 or int4, or leave it out")


def check_counts(**counts: object) -> None:
    """Integers that make sense."""
    for name, value in counts.items():
        if type(value) is not int or value < LEAST.get(name, 1):
            raise ValueError(f"--{name} must be {LEAST.get(name, 1)} or more, not {value!r}")
