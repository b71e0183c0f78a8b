"""The eight processes of test_footprint.py: build models on 1 to 8 ranks and count bytes."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs_init
from torch import Tensor, nn

from llama.common.dtypes import parse_dtype
from llama.layers.quantized_linear import quantized
from llama.layers.replace import replace_modules
from llama.model import ModelArgs, Transformer

BATCH, CONTEXT = 3, 40
SHAPES: list[dict[str, Any]] = [
    # A rank has 8 rows of keys, half an int4 tile; there are fewer KV heads than ranks.
    {"dim": 256, "n_layers": 2, "n_heads": 32, "n_kv_heads": 4, "vocab_size": 330},
    {"dim": 64, "n_layers": 3, "n_heads": 8, "vocab_size": 104, "multiple_of": 64},
]


def cases() -> Iterator[tuple[int, bool, str, str | None]]:
    """(index of the shape, tied, dtype, scheme)."""
    return itertools.product(
        range(len(SHAPES)), (False, True), ("bf16", "fp32"), (None, "int8", "int4")
    )


def storage_bytes(tensors: Iterator[Tensor]) -> int:
    """Bytes of the distinct storages."""
    storages = {w.untyped_storage()._cdata: w.untyped_storage().nbytes() for w in tensors}
    return sum(storages.values())


def built_bytes(
    shape: int, tied: bool, dtype: str, scheme: str | None, device: str
) -> list[int] | None:
    """Bytes of [weights, caches] on this rank; None if the scheme does not divide the weights."""
    with torch.device(device):
        model = Transformer(ModelArgs(**SHAPES[shape])).to(parse_dtype(dtype))
        if tied:
            model.output.weight = model.tok_embeddings.weight
        if scheme is not None:
            try:
                replace_modules(model, {nn.Linear: quantized(scheme)})
            except ValueError:
                return None
        cache = model.new_cache(BATCH, CONTEXT)
    caches = (t for layer in cache for t in (layer.k, layer.v))
    return [storage_bytes(iter(model.state_dict().values())), storage_bytes(caches)]


def main(rank: int, folder: str) -> None:
    """Write {ranks: [bytes of each case]} to folder/RANK.json; rank 0 also builds on meta."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=8)
    result = {}
    for ranks in (1, 2, 4, 8):
        with contextlib.redirect_stdout(sys.stderr):  # fairscale prints
            fs_init.initialize_model_parallel(ranks)
        devices = ("cpu",) if rank else ("cpu", "meta")
        result[ranks] = [[built_bytes(*case, device) for case in cases()] for device in devices]
        fs_init.destroy_model_parallel()
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
