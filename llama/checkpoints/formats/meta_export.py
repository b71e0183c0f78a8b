"""Any source -> Meta's layout, quantized or not, with a few tensors in memory at a time."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoints.formats.quantized import quantize_weight, quantized_params
from llama.checkpoints.load import read_part
from llama.checkpoints.source import Source, released_context
from llama.common.files import write_json
from llama.common.progress import progress
from llama.distributed.sharding import rank_counts, weight_shapes
from llama.layers.schemes import Scheme
from llama.model import ModelArgs

log = logging.getLogger("llama")


def write_meta(
    source: Source,
    vocabulary: tuple[bytes, dict[str, Any]] | None,
    folder: Path,
    dtype: torch.dtype | None = None,
    mp: int = 1,
    quantization: Scheme | None = None,
    calibrated: Iterable[tuple[str, Tensor]] | None = None,
) -> None:
    """Write params.json, `mp` shards and the tokenizer into an existing folder.

    Args:
        vocabulary: content of tokenizer.model and its sidecar (empty: no sidecar is written);
            None: no tokenizer is written.
        dtype: of all plain weights; None: the stored dtypes.
        quantization: how the linears are stored, with `mp` 1; None: plain weights.
        calibrated: (stored name, tensor) of all weights, quantized as `quantization` says; None:
            quantize the weights of `source`.

    Raises:
        ValueError: `mp` ranks cannot share this model, or it cannot be quantized like this.
        OSError: the files cannot be written.
    """
    args = source.args()
    # Shards have equal sizes here, unlike the ranks' shares of a vocabulary (`read_part` pads it).
    possible = [n for n in rank_counts(args) if args.vocab_size % n == 0]
    if mp not in possible:
        raise ValueError(f"this model cannot be split over {mp}; use one of {possible}")
    params = quantized_params(source, quantization) if quantization else source.params
    if source.context != released_context(params):  # Meta's files do not say it
        params = params | {"max_seq_len": source.context}
    write_json(folder / "params.json", params)
    if vocabulary is not None:
        (folder / "tokenizer.model").write_bytes(vocabulary[0])
        if vocabulary[1]:
            write_json(folder / "tokenizer.model.json", vocabulary[1])
    for rank in range(mp):
        path = folder / f"consolidated.{rank:02}.pth"
        with tempfile.TemporaryDirectory(prefix=".spill-", dir=folder) as spill:
            if quantization is None:
                state = _plain_shard(source, args, dtype, rank=rank, mp=mp, spill=Path(spill))
            else:
                weights = calibrated or _quantized(source, args, dtype, quantization)
                state = {n: _on_disk(w, Path(spill) / str(i)) for i, (n, w) in enumerate(weights)}
            log.info("writing %s", path.name)
            try:
                torch.save(state, path)
            except RuntimeError as e:  # of torch, for a failed write
                raise OSError(f"{path} could not be written; is the disk full? ({e})") from e
            del state


def _plain_shard(
    source: Source, args: ModelArgs, dtype: torch.dtype | None, *, rank: int, mp: int, spill: Path
) -> dict[str, Tensor]:
    """The state dict of one of `mp` shards, in files of `spill`, not in memory."""
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
    source: Source, args: ModelArgs, dtype: torch.dtype | None, scheme: Scheme
) -> Iterator[tuple[str, Tensor]]:
    """(stored name, tensor) of each weight of the whole quantized model."""
    names = list(weight_shapes(args))
    for name in progress(names, "quantizing", len(names), "tensor"):
        w = source.read(name)
        stored = quantize_weight(name, w.to(dtype or w.dtype), scheme)
        if name not in stored and not w.isfinite().all():  # codes would not show it
            raise ValueError(
                f"{name} of {source.path} has NaN or infinite numbers; run `llama3 verify`"
            )
        yield from stored.items()


def _on_disk(w: Tensor, path: Path) -> Tensor:
    """Write `w` to `path` and map it from there, so that torch.save does not need it in memory."""
    raw = w.contiguous().flatten().view(torch.uint8).numpy()
    with open(path, "wb") as f:
        f.write(raw.data)
    return torch.from_file(str(path), shared=False, size=w.numel(), dtype=w.dtype).view(w.shape)
