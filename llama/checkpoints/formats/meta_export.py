"""Write the official layout from any source, a few tensors in memory at a time."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoints.formats.quantized import held, params_of
from llama.checkpoints.load import read_part
from llama.checkpoints.source import Source
from llama.common.progress import progress
from llama.distributed.sharding import rank_counts, weight_shapes
from llama.model import ModelArgs


def write_meta(
    source: Source,
    vocabulary: tuple[bytes, dict[str, Any]] | None,
    folder: Path,
    dtype: torch.dtype | None = None,
    mp: int = 1,
    quantization: tuple[str, int] | None = None,
) -> None:
    """Write params.json, `mp` shards and the tokenizer into an existing folder.

    Args:
        vocabulary: tokenizer.model and its sidecar (empty: none is written); None writes neither.
        dtype: of all weights; None keeps what is stored.
        quantization: (scheme, group) that the linears' weights get from there, in one shard.

    Raises:
        ValueError: `mp` ranks cannot share this model, or it cannot be quantized so.
        OSError: the disk is full.
    """
    args = source.args()
    # Shards of this layout are equal; ranks pad their share of a vocabulary when they load it.
    possible = [n for n in rank_counts(args) if args.vocab_size % n == 0]
    if mp not in possible:
        raise ValueError(f"this model cannot be split over {mp}; use one of {possible}")
    params = params_of(source, *quantization) if quantization else source.params
    _write_json(folder / "params.json", params)
    if vocabulary is not None:
        (folder / "tokenizer.model").write_bytes(vocabulary[0])
        if vocabulary[1]:
            _write_json(folder / "tokenizer.model.json", vocabulary[1])
    for rank in range(mp):
        path = folder / f"consolidated.{rank:02}.pth"
        with tempfile.TemporaryDirectory(prefix=".spill-", dir=folder) as spill:
            if quantization is None:
                state = _shard(source, args, dtype, rank, mp, Path(spill))
            else:
                state = _quantized(source, args, dtype, quantization, Path(spill))
            print(f"writing {path.name}", file=sys.stderr)
            try:
                torch.save(state, path)
            except RuntimeError as e:  # torch's word for a write that failed
                raise OSError(f"{path} could not be written; is the disk full? ({e})") from e
            del state


def _write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _shard(
    source: Source, args: ModelArgs, dtype: torch.dtype | None, rank: int, mp: int, spill: Path
) -> dict[str, Tensor]:
    """The state dict of one rank, in files rather than in memory."""
    state: dict[str, Tensor] = {}
    names = list(weight_shapes(args))
    for name in progress(names, f"shard {rank + 1} of {mp}", len(names), "tensor"):
        if name == "output.weight" and source.tied:
            state[name] = state["tok_embeddings.weight"]
        else:
            part = read_part(source, name, args, rank, mp)
            state[name] = _on_disk(part.to(dtype or part.dtype), spill / str(len(state)))
    return state


def _quantized(
    source: Source,
    args: ModelArgs,
    dtype: torch.dtype | None,
    quantization: tuple[str, int],
    spill: Path,
) -> dict[str, Tensor]:
    """The state dict of a quantized checkpoint, in files rather than in memory."""
    state: dict[str, Tensor] = {}
    names = list(weight_shapes(args))
    for name in progress(names, "quantizing", len(names), "tensor"):
        w = source.read(name)
        for key, tensor in held(name, w.to(dtype or w.dtype), *quantization).items():
            # Scales and zeros show it: they come of each group's extremes.
            if key != name and tensor.is_floating_point() and not tensor.isfinite().all():
                raise ValueError(
                    f"{name} of {source.path} has NaN or infinite numbers; `llama3 verify` it"
                )
            state[key] = _on_disk(tensor, spill / str(len(state)))
    return state


def _on_disk(w: Tensor, path: Path) -> Tensor:
    """The same tensor, mapped from a file of its own: torch.save then streams it from there."""
    raw = w.contiguous().flatten().view(torch.uint8).numpy()
    with open(path, "wb") as f:
        f.write(raw.data)
    return torch.from_file(str(path), shared=False, size=w.numel(), dtype=w.dtype).view(w.shape)
