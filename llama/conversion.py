"""Any layout -> Meta's or Hugging Face's, whole or not at all."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch

from llama.convert import new_folder
from llama.convert.meta import write_meta
from llama.formats import open_checkpoint, open_tokenizer, vocabulary_of
from llama.source import Source, weight_shapes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "meta",
    mp: int | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> Path:
    """Write the checkpoint `src`, of any layout, as the folder `dst`; returns `dst`.

    Tensor by tensor: memory for a few tensors, and disk for the result and one shard more. What is
    interrupted leaves `dst` as it was, and is simply run again.

    Args:
        to: "meta" (the official layout) or "hf" (Hugging Face).
        mp: shards of the official layout; None keeps the source's number.
        dtype: "bf16", "fp16" or "fp32"; None keeps what is stored (a GGUF's weights become bf16).
        force: replace a `dst` that exists, once the new one is whole.

    Raises:
        FileExistsError: `dst` exists and not `force`.
        FileNotFoundError, ValueError, ImportError: `src`, see `open_checkpoint`.
        OSError: the disk is full.
    """
    check_options(to, mp, dtype, force)
    src, dst = Path(src), Path(dst)
    source = open_checkpoint(src)
    if dst.resolve() in (source.path.resolve(), *source.path.resolve().parents):
        raise ValueError(f"{dst} holds the source itself; choose another folder")
    chosen = DTYPES[dtype] if dtype else torch.bfloat16 if source.layout == "gguf" else None
    with new_folder(dst, force) as folder:
        # A shard of the official layout stands on the disk twice while it is written.
        shards = (mp or source.n_shards) if to == "meta" else 0
        check_free_space(source, folder, chosen, 1 + 1 / shards if shards else 1)
        if to == "meta":
            vocabulary = vocabulary_of(source)
            if vocabulary is None:
                warnings.warn(f"{src} has no tokenizer: add its tokenizer.model", stacklevel=2)
            write_meta(source, vocabulary, folder, chosen, shards)
        else:
            from llama.convert.hf_export import write_hf

            write_hf(source, open_tokenizer(source), folder, chosen)
    return dst


def check_options(to: str, mp: int | None, dtype: str | None, force: bool) -> None:
    """Raise a ValueError or TypeError for options that make no sense."""
    if to not in ("meta", "hf"):
        raise ValueError(f"cannot convert to {to!r}; use 'meta' or 'hf'")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; use one of {list(DTYPES)}")
    if to == "hf" and mp is not None:
        raise ValueError("mp is for --to meta: Hugging Face's files do not depend on ranks")
    for name, value, kind in (("mp", mp, int), ("force", force, bool)):
        if value is not None and type(value) is not kind:
            raise TypeError(f"{name} must be of type {kind.__name__}, not {value!r}")


def check_free_space(
    source: Source, folder: Path, dtype: torch.dtype | None, copies: float
) -> None:
    """Refuse to start what the disk has no room for, `copies` times the weights."""
    needed = 0
    for name, shape in weight_shapes(source.args()).items():
        if not (name == "output.weight" and source.tied):
            needed += torch.Size(shape).numel() * (dtype or source.dtype(name)).itemsize
    needed = int(needed * copies)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"writing this needs {needed / 1e9:.1f} GB and {folder.parent} has {free / 1e9:.1f} GB "
            "free; free some or choose another disk"
        )
