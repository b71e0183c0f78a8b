"""Any layout -> Meta's, quantized or not, or Hugging Face's: whole or not at all."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from llama.checkpoints.formats.meta_export import write_meta
from llama.checkpoints.formats.quantized import sizes
from llama.checkpoints.formats.vocabulary import new_folder
from llama.checkpoints.open import open_checkpoint, open_tokenizer, vocabulary_of
from llama.checkpoints.source import Source
from llama.distributed.sharding import weight_shapes
from llama.layers.quantized_linear import check_scheme

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
    source = open_source(src, dst)
    chosen = DTYPES[dtype] if dtype else kept_dtype(source)
    with new_folder(dst, force) as folder:
        # A shard of the official layout stands on the disk twice while it is written.
        shards = (mp or source.n_shards) if to == "meta" else 0
        needed = 0
        for name, shape in weight_shapes(source.args()).items():
            if not (name == "output.weight" and source.tied):
                needed += torch.Size(shape).numel() * (chosen or source.dtype(name)).itemsize
        check_free_space(folder, int(needed * (1 + 1 / shards if shards else 1)))
        if to == "meta":
            write_meta(source, vocabulary_or_warning(source), folder, chosen, shards)
        else:
            from llama.checkpoints.formats.hf_export import write_hf

            write_hf(source, open_tokenizer(source), folder, chosen)
    return dst


def quantize(src: str | Path, dst: str | Path, scheme: str, group: int | None = None) -> Path:
    """Write the checkpoint `src`, of any layout, quantized, as the folder `dst`; returns `dst`.

    It holds what `Llama.build(src, ..., quantize=scheme)` makes of the weights in the dtype that
    they are stored in (a GGUF's in bf16). Weight by weight: memory for two, and disk for the result
    twice. What is interrupted leaves no `dst`.

    Args:
        scheme: "int8" or "int4"; see `linears.quantized` for what stays as it is.
        group: 32, 64 or 128 inputs of an int4 weight share a scale; None is 32.

    Raises:
        ValueError: no such scheme or group, it does not divide a weight, or `src` is quantized.
        FileExistsError, FileNotFoundError, ImportError, OSError: as `convert`.
    """
    check_scheme(scheme, 32 if group is None else group)
    if scheme == "int8" and group is not None:
        raise ValueError("group is for int4: int8 has a scale for each output")
    src, dst = Path(src), Path(dst)
    source = open_source(src, dst)
    chosen, quantization = kept_dtype(source), (scheme, group or 32)
    stored = sizes(source.args(), *quantization)  # refuses a group before anything is written
    needed = 0
    for name, w in stored.items():
        plain = chosen or source.dtype(name) if name.endswith(".weight") else w.dtype
        needed += w.numel() * plain.itemsize
    with new_folder(dst) as folder:
        check_free_space(folder, 2 * needed)  # it stands on the disk twice while it is written
        vocabulary = vocabulary_or_warning(source)
        write_meta(source, vocabulary, folder, chosen, quantization=quantization)
    return dst


def open_source(src: Path, dst: Path) -> Source:
    """Open `src` to write it as `dst`.

    Raises:
        ValueError: `src` is quantized, or `dst` holds it; and what `open_checkpoint` raises.
    """
    source = open_checkpoint(src)
    if source.quantization is not None:
        raise ValueError(
            f"{src} is quantized already ({source.quantization[0]}), and what that lost cannot be "
            "had back; give the original checkpoint"
        )
    if dst.resolve() in (source.path.resolve(), *source.path.resolve().parents):
        raise ValueError(f"{dst} holds the source itself; choose another folder")
    return source


def kept_dtype(source: Source) -> torch.dtype | None:
    """The dtype to write without being asked for one; None: as stored."""
    return torch.bfloat16 if source.layout == "gguf" else None


def vocabulary_or_warning(source: Source) -> tuple[bytes, dict[str, Any]] | None:
    """As `vocabulary_of`."""
    vocabulary = vocabulary_of(source)
    if vocabulary is None:
        warnings.warn(f"{source.path} has no tokenizer: add its tokenizer.model", stacklevel=3)
    return vocabulary


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


def check_free_space(folder: Path, needed: int) -> None:
    """Refuse to start what the disk has no room for: `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"writing this needs {needed / 1e9:.1f} GB and {folder.parent} has {free / 1e9:.1f} GB "
            "free; free some or choose another disk"
        )
