"""Any layout -> Meta's (quantized or not) or Hugging Face's, as a folder that appears complete."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from llama.checkpoints.calibration import Calibration, calibrated_weights, cut_windows
from llama.checkpoints.formats.meta_export import write_meta
from llama.checkpoints.formats.quantized import stored_tensors
from llama.checkpoints.locate import expand
from llama.checkpoints.open import (
    find_vocabulary,
    open_checkpoint,
    open_tokenizer,
    tokenizer_of,
)
from llama.checkpoints.source import Source
from llama.common.dtypes import parse_dtype
from llama.common.files import check_free_space, new_folder
from llama.distributed import job
from llama.distributed.sharding import weight_shapes
from llama.layers.schemes import Scheme, find_scheme
from llama.tokenizer import Tokenizer

# Suffixes of the files that a conversion writes.
WRITTEN_SUFFIXES = {".pth", ".json", ".model", ".safetensors"}


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "meta",
    mp: int | None = None,
    dtype: str | torch.dtype | None = None,
    force: bool = False,
) -> Path:
    """Write the checkpoint `src`, of any layout, as the folder `dst`; returns `dst`.

    Needs memory for a few tensors, and disk for the result and one more shard. An interrupted
    conversion leaves `dst` as it was; start it again.

    Args:
        to: "meta" (Meta's layout) or "hf" (Hugging Face's).
        mp: number of shards in Meta's layout; None: as many as `src` has.
        dtype: of all weights, such as "bf16" or "bfloat16"; None or "auto": the stored dtypes
            (bfloat16 for a GGUF).
        force: replace a `dst` that exists, once the new one is complete.

    Raises:
        FileExistsError: `dst` exists and not `force`, or it contains more than a checkpoint.
        FileNotFoundError, ValueError, ImportError: `src`, see `open_checkpoint`.
        OSError: the disk is full.
    """
    chosen = check_options(to, mp, dtype, force)
    src, dst = expand(src), expand(dst)
    source = open_for_conversion(src, dst)
    write_checkpoint(source, dst, to, chosen or default_dtype(source), mp=mp, force=force)
    return dst


def write_checkpoint(
    source: Source,
    dst: Path,
    to: str,
    dtype: torch.dtype | None,
    *,
    mp: int | None = None,
    force: bool = False,
) -> None:
    """Write an open checkpoint as the folder `dst`, which appears when it is complete.

    Args:
        to, mp, force: see `convert`.
        dtype: of all weights; None: the stored dtypes.

    Raises:
        FileExistsError, ValueError, ImportError, OSError: see `convert`.
    """
    if force and os.path.lexists(dst) and not is_checkpoint_folder(dst):
        raise FileExistsError(f"{dst} is not a folder of checkpoint files only; it is not replaced")
    with new_folder(dst, replace=force) as folder:
        # While a shard of Meta's layout is written, it is on the disk twice.
        shards = (mp or source.n_shards) if to == "meta" else 0
        needed = 0
        for name, shape in weight_shapes(source.args()).items():
            if not (name == "output.weight" and source.tied):
                needed += torch.Size(shape).numel() * (dtype or source.dtype(name)).itemsize
        check_free_space(dst, int(needed * (1 + 1 / shards if shards else 1)))
        if to == "meta":
            write_meta(source, checked_vocabulary(source), folder, dtype=dtype, mp=shards)
        else:
            from llama.checkpoints.formats.hf_export import write_hf

            write_hf(source, open_tokenizer(source), folder, dtype)


def quantize(
    src: str | Path,
    dst: str | Path,
    scheme: Scheme | str,
    calibration: Calibration | None = None,
) -> Path:
    """Write the checkpoint `src`, of any layout, quantized, as the folder `dst`; returns `dst`.

    The result has the numbers that `Llama.build(src, ..., quantize=scheme)` computes from the
    weights in their stored dtype (bfloat16 for a GGUF). Needs memory for two weights, and twice the
    disk space of the result. An interrupted quantization leaves no `dst`.

    A calibrated int4 has the same size and speed and smaller errors. It needs a tokenizer, the
    time of about three prefills of the calibration's text, and memory for a layer, the moments of
    its inputs and the text's hidden states.

    Args:
        scheme: "int8" or "int4"; `llama.layers.quantized_linear` says which weights stay plain.
        calibration: see `llama.checkpoints.calibration`; None: each weight by itself.

    Raises:
        ValueError: unknown scheme, a weight that it cannot store, a `src` that is quantized
            already, or a calibration that is impossible.
        TypeError: `calibration` is something else, such as the size of a group.
        FileExistsError, FileNotFoundError, ImportError, OSError: as `convert`.
    """
    quantization = find_scheme(scheme)
    if calibration is not None:
        if not isinstance(calibration, Calibration):
            raise TypeError(f"calibration must be a Calibration(text), not {calibration!r}")
        check_calibrated(quantization)
    src, dst = expand(src), expand(dst)
    source = open_for_conversion(src, dst)
    chosen = default_dtype(source)
    needed = 0
    for name, w in stored_tensors(source.args(), quantization).items():
        dtype = chosen or source.dtype(name) if name.endswith(".weight") else w.dtype
        needed += w.numel() * dtype.itemsize
    with new_folder(dst) as folder:
        check_free_space(dst, 2 * needed)  # while it is written, it is on the disk twice
        vocabulary, weights = checked_vocabulary(source), None
        if calibration is not None:
            tokenizer = tokenizer_for_calibration(source, vocabulary)
            ids = cut_windows(calibration, tokenizer, source.context)
            weights = calibrated_weights(source, chosen, quantization, ids)
        write_meta(
            source, vocabulary, folder, dtype=chosen, quantization=quantization, calibrated=weights
        )
    return dst


def check_calibrated(scheme: Scheme) -> None:
    """Check that a calibration can choose the codes of a scheme, in this process alone.

    Raises:
        ValueError: it cannot.
    """
    if scheme.layers.kind != "blocks":
        raise ValueError(f"a calibration is for int4; {scheme.name} loses too little to need one")
    if not job.is_single_process():
        raise ValueError("a calibration runs in one process: call it without torchrun")


def tokenizer_for_calibration(
    source: Source, vocabulary: tuple[bytes, dict[str, Any]] | None
) -> Tokenizer:
    """The tokenizer of what `find_vocabulary` found.

    Raises:
        FileNotFoundError: it found none.
    """
    if vocabulary is None:
        raise FileNotFoundError(
            f"{source.path} has no tokenizer, which a calibration needs; add its tokenizer.model"
        )
    return tokenizer_of(source, vocabulary)


def open_for_conversion(src: Path, dst: Path) -> Source:
    """Open `src` in order to write it as `dst`.

    Raises:
        ValueError: `src` is quantized, or is inside `dst`.
        FileNotFoundError, ImportError: see `open_checkpoint`.
    """
    source = open_checkpoint(src)
    if source.quantization is not None:
        raise ValueError(
            f"{src} is quantized already ({source.quantization.name}) and cannot be converted; "
            "give the original checkpoint"
        )
    if dst.resolve() in (source.path.resolve(), *source.path.resolve().parents):
        raise ValueError(f"{dst} contains the source itself; choose another folder")
    return source


def is_checkpoint_folder(path: Path) -> bool:
    """Whether a folder contains nothing but files that a conversion writes."""
    return (
        path.is_dir()
        and not path.is_symlink()
        and all(f.is_file() and f.suffix in WRITTEN_SUFFIXES for f in path.iterdir())
    )


def default_dtype(source: Source) -> torch.dtype | None:
    """The dtype to write if the user names none; None: the stored dtypes."""
    return torch.bfloat16 if source.layout == "gguf" else None


def checked_vocabulary(source: Source) -> tuple[bytes, dict[str, Any]] | None:
    """`find_vocabulary`, with a warning if there is none.

    Raises:
        ValueError: the vocabulary is not of this model, see `open_tokenizer`.
    """
    vocabulary = find_vocabulary(source)
    if vocabulary is None:
        warnings.warn(f"{source.path} has no tokenizer: add its tokenizer.model", stacklevel=3)
    else:
        tokenizer_of(source, vocabulary)
    return vocabulary


def check_options(
    to: str, mp: int | None, dtype: str | torch.dtype | None, force: bool
) -> torch.dtype | None:
    """Check the options of `convert`; returns the dtype, None for the stored ones.

    Raises:
        ValueError, TypeError: an option has an impossible value or type.
    """
    if to not in ("meta", "hf"):
        raise ValueError(f"cannot convert to {to!r}; use 'meta' or 'hf'")
    chosen = parse_dtype(dtype)
    if to == "hf" and mp is not None:
        raise ValueError("mp is for --to meta: Hugging Face's files do not depend on ranks")
    for name, value, kind in (("mp", mp, int), ("force", force, bool)):
        if value is not None and type(value) is not kind:
            raise TypeError(f"{name} must be of type {kind.__name__}, not {value!r}")
    if mp is not None and mp < 1:
        raise ValueError(f"mp must be 1 or more, not {mp}")
    return chosen
