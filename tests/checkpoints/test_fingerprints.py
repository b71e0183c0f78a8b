"""`Source.fingerprints`: what ranks compare differs wherever a weight of their files does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama.checkpoints.formats.gguf_header import read_header
from llama.checkpoints.formats.hf_config import hf_name
from llama.checkpoints.open import open_checkpoint
from tests.fuzz.bases import base, write_base


def weights_of(folder: Path) -> str:
    return open_checkpoint(folder).fingerprints()["the weights"]


def write_part(folder: Path, name: str, change: float) -> None:
    """Add `change` to the last row of a weight of the checkpoint in `folder`."""

    def add(w: Tensor) -> Tensor:
        w = w.clone()
        w[-1] += change
        return w

    if (pth := folder / "consolidated.00.pth").exists():
        weights = torch.load(pth, weights_only=True)
        stored = next(n for n in weights if n.rpartition(".")[0] == name.removesuffix(".weight"))
        torch.save(weights | {stored: add(weights[stored])}, pth)
        return
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        if hf_name(name) in weights:
            save_file(weights | {hf_name(name): add(weights[hf_name(name)])}, file)


@pytest.mark.parametrize("layout", ["meta", "int8", "int4", "hf"])
def test_one_weight_of_another_model(layout: str, tmp_path: Path) -> None:
    good = weights_of(write_base(tmp_path / "good", base(layout)))
    assert weights_of(write_base(tmp_path / "same", base(layout))) == good
    layer = [f"attention.{w}" for w in ("wq", "wk", "wv", "wo")] + ["attention_norm", "ffn_norm"]
    layer += [f"feed_forward.w{i}" for i in (1, 2, 3)]
    names = [f"layers.0.{name}.weight" for name in layer]
    for i, name in enumerate(["tok_embeddings.weight", "output.weight", "norm.weight", *names]):
        folder = write_base(tmp_path / str(i), base(layout))
        write_part(folder, name, 0)
        unchanged = weights_of(folder)
        write_part(folder, name, 1)
        assert weights_of(folder) != unchanged, name


def test_one_byte_of_a_gguf(tmp_path: Path) -> None:
    path = write_base(tmp_path / "good", base("gguf")) / "a.gguf"
    good, content = weights_of(path), path.read_bytes()
    for tensor in read_header(path).tensors:
        if tensor.name == "rope_freqs.weight":
            continue  # its factor is compared with the other sizes
        data = bytearray(content)
        data[tensor.start] ^= 1
        path.write_bytes(data)
        assert weights_of(path) != good, tensor.name
