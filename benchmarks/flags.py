"""Checks of the flags that benchmarks share. Each raises a ValueError that names the flag."""

from __future__ import annotations

from pathlib import Path

from benchmarks.random_checkpoint import SHAPES

DTYPES = ("bfloat16", "float16", "float32")
MINIMUM = {"new": 2, "length": 2, "context": 0}  # 1 for every other count


def check_model(shape: str, dtype: str, quantize: str | None = None) -> None:
    """Check the names of a shape, a dtype and a quantization scheme."""
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}; use one of {', '.join(SHAPES)}")
    check_dtype(dtype)
    if quantize not in (None, "int8", "int4"):
        raise ValueError(f"unknown scheme {quantize!r}; use int8 or int4, or leave it out")


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}")


def check_counts(**counts: object) -> None:
    """Check that each count is an integer and not below its minimum."""
    for name, value in counts.items():
        minimum = MINIMUM.get(name, 1)
        if type(value) is not int or value < minimum:
            raise ValueError(f"--{name} must be {minimum} or more, not {value!r}")


def check_file(flag: str, path: str | None, suffix: str) -> None:
    """Check that a file of this suffix can be created: its folder exists, and it does not."""
    if path is None:
        return
    if Path(path).suffix != suffix or not Path(path).absolute().parent.is_dir():
        raise ValueError(f"--{flag} {path!r} must name a {suffix} file in an existing folder")
    if Path(path).exists():
        raise ValueError(f"--{flag} {path!r} exists already; remove it or choose another name")
