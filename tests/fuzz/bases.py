"""Small good checkpoints of every layout, as {name: content}."""

from __future__ import annotations

import functools
import io
import json
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama.checkpoints.convert import convert, quantize
from llama.checkpoints.formats.gguf import GGUF_NAMES
from llama.distributed.sharding import weight_shapes
from llama.model import ModelArgs
from tests.checkpoints.gguf_files import VOCAB, vocabulary_keys, write_gguf
from tests.models import random_weights

SIZES: dict[str, Any] = {
    "dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "vocab_size": VOCAB, "multiple_of": 16,
}  # fmt: skip
GGUF_KEYS: dict[str, Any] = {
    "llama.block_count": 1,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": ModelArgs(**SIZES).hidden_dim,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.context_length": 64,
    "llama.vocab_size": VOCAB,
    "general.alignment": 32,
    "tokenizer.chat_template": "{{ messages }}",
}
Files = dict[str, bytes]


@functools.cache
def base(layout: str) -> Files:
    """The files of a good checkpoint: "meta", "int8", "int4", "hf" or "gguf"."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / layout
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _WRITERS[layout](folder)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _write_gguf(folder: Path) -> None:
    folder.mkdir()
    write_gguf_with(folder / "a.gguf", {})


def write_gguf_with(path: Path, keys: dict[str, Any]) -> None:
    """Write the base with other values of keys; None leaves a key out."""
    tensors = {}
    for name, shape in weight_shapes(ModelArgs(**SIZES)).items():
        *layer, stem = name.removesuffix(".weight").split(".", 2)
        prefix = f"blk.{layer[1]}." if layer else ""
        tensors[f"{prefix}{GGUF_NAMES[stem]}.weight"] = np.ones(shape, np.float32)
    tensors["rope_freqs.weight"] = np.ones(8, np.float32)
    write_gguf(path, tensors, vocabulary_keys("smollm") | GGUF_KEYS | keys)


def _write_meta(folder: Path) -> None:
    """The tokenizer is that of the GGUF, with a sidecar."""
    convert(write_base(folder.parent / "gguf", base("gguf")) / "a.gguf", folder, to="meta")
    torch.save(random_weights(**SIZES), folder / "consolidated.00.pth")


def _write_int8(folder: Path) -> None:
    quantize(write_base(folder.parent / "meta", base("meta")), folder, "int8")


def _write_int4(folder: Path) -> None:
    quantize(write_base(folder.parent / "meta", base("meta")), folder, "int4")


def _write_hf(folder: Path) -> None:
    """With several shards and an index."""
    from safetensors.torch import load_file, save_file

    convert(write_base(folder.parent / "meta", base("meta")), folder, to="hf")
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


_WRITERS = {
    "meta": _write_meta, "int8": _write_int8, "int4": _write_int4, "hf": _write_hf,
    "gguf": _write_gguf,
}  # fmt: skip


def write_base(folder: Path, files: Files) -> Path:
    """Write the files into a new folder."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def records_of(archive: bytes) -> Files:
    """The records of a file of `torch.save`."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return {name: file.read(name) for name in file.namelist()}


def archive_of(records: Files) -> bytes:
    """A zip archive whose checksums are right."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for name, record in records.items():
            file.writestr(name, record)
    return content.getvalue()
