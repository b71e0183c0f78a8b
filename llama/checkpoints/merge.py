"""A base and an adapter -> a checkpoint: each weight is summed in fp32 and rounded once."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from llama.checkpoints.adapted import AdaptedSource
from llama.checkpoints.adapter import Adapter, is_adapter, read_adapter
from llama.checkpoints.convert import check_options, default_dtype, write_checkpoint
from llama.checkpoints.locate import expand
from llama.checkpoints.open import open_checkpoint
from llama.checkpoints.source import Source
from llama.layers.lora import merged


class MergedSource(AdaptedSource):
    """A base with an adapter's updates in its weights.

    Args:
        stored: the dtype of all weights; None: that of each weight of the base.
    """

    def __init__(self, base: Source, adapter: Adapter, stored: torch.dtype | None):
        super().__init__(base, adapter)
        self.stored = stored

    def dtype(self, name: str) -> torch.dtype:
        return self.stored or self.base.dtype(name)

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        linear, dtype = name.removesuffix(".weight"), self.dtype(name)
        a, b, m = (
            self.adapter.weights.get(f"{linear}.lora_{part}") for part in ("a", "b", "magnitude")
        )
        if a is None or b is None:
            return super().read(name, dim, start, stop).to(dtype)
        if dim == 1:  # DoRA needs whole rows
            return self.read(name)[:, start:stop]
        w = self.base.read(name, 0, start, stop)
        rows = slice(start, stop)
        whole = merged(w, a, b[rows], self.adapter.config, None if m is None else m[rows])
        return whole.to(dtype)

    def read_slice(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        return self.read(name, dim, start, stop)


def merge(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    to: str | None = None,
    dtype: str | torch.dtype | None = None,
    force: bool = False,
) -> Path:
    """Write the checkpoint `base`, of any layout, with an adapter merged into it; returns `out`.

    Needs memory for a few tensors. The base is not changed. An interrupted merge leaves `out` as it
    was; start it again.

    Args:
        to: "meta" or "hf"; None: Hugging Face's layout for a base in it, else Meta's.
        dtype: of all weights; None or "auto": the base's (bfloat16 for a GGUF).
        force: replace an `out` that exists, once the new one is complete.

    Raises:
        FileExistsError: `out` exists and not `force`, or it contains more than a checkpoint.
        FileNotFoundError, ValueError, ImportError: see `open_checkpoint` and `read_adapter`; or the
            base is quantized.
        OSError: the disk is full.
    """
    chosen = check_options("meta" if to is None else to, None, dtype, force)
    out = expand(out)
    if is_adapter(expand(base)) and not is_adapter(expand(adapter)):
        raise ValueError(f"{base} is an adapter: give the base first, then the adapter")
    source = open_checkpoint(base)
    if source.quantization is not None:
        raise ValueError(
            f"{base} is quantized ({source.quantization.name}), and merging would round its "
            "weights again; merge into the original checkpoint, then quantize the result"
        )
    found = read_adapter(adapter, source)
    for path in (source.path, found.path):
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise ValueError(f"{out} contains what is read, {path}; choose another folder")
    stored = chosen or default_dtype(source)
    result = MergedSource(source, found, stored)
    layout = to or ("hf" if source.layout == "hf" else "meta")
    write_checkpoint(result, out, layout, stored, mp=shards_of(result), force=force)
    return out


def shards_of(source: Source) -> int | None:
    """As many shards as the base has; one if they cannot have equal parts of a new vocabulary."""
    return source.n_shards if source.params["vocab_size"] % source.n_shards == 0 else 1
