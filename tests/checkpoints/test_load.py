"""load.py, formats/meta.py: the loaded model has the weights of the files; bad files are errors."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.checkpoints.formats.meta import read_params
from llama.checkpoints.load import load_model
from llama.checkpoints.open import open_checkpoint
from llama.model import Transformer

Tiny = Callable[..., Path]
CPU = torch.device("cpu")
SMALL = {"vocab_size": 300}


def load_folder(folder: Path, dtype: torch.dtype = torch.float32) -> Transformer:
    source = open_checkpoint(folder)
    return load_model(source, source.args(max_seq_len=32), CPU, dtype)


def test_weights_are_those_of_the_file(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint(**SMALL)
    model = load_folder(folder)
    stored = torch.load(folder / "consolidated.00.pth", weights_only=True)
    assert set(model.state_dict()) == set(stored)
    for name, w in model.state_dict().items():
        assert torch.equal(w, stored[name]), name
    assert not model.training


def test_parameters_are_the_mapped_file(tiny_checkpoint: Tiny) -> None:
    """In the stored dtype weights are not copied."""
    folder = tiny_checkpoint(**SMALL)
    model = load_folder(folder)
    path = os.path.realpath(folder / "consolidated.00.pth")
    mapped = [
        [int(end, 16) for end in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(path)
    ]
    assert mapped
    for w in model.parameters():
        assert any(low <= w.data_ptr() < high for low, high in mapped)


def test_tied_weights_are_one_tensor(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint(**SMALL)
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True)
    weights["output.weight"] = weights["tok_embeddings.weight"]
    torch.save(weights, folder / "consolidated.00.pth")
    for dtype in (torch.float32, torch.bfloat16):
        model = load_folder(folder, dtype)
        assert model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()
        assert model.output.weight.dtype == dtype


def test_old_rope_table_is_ignored(tiny_checkpoint: Tiny) -> None:
    folder = tiny_checkpoint(**SMALL)
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True)
    torch.save(weights | {"rope.freqs": torch.ones(8)}, folder / "consolidated.00.pth")
    load_folder(folder)


class RunsCode:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


def damage(folder: Path, kind: str) -> None:
    """Damage a good checkpoint."""
    pth, params = folder / "consolidated.00.pth", folder / "params.json"
    weights = torch.load(pth, weights_only=True) if pth.is_file() else {}
    values = json.loads(params.read_text())
    if kind == "no shards":
        pth.unlink()
    elif kind == "no params":
        params.unlink()
    elif kind == "params not json":
        params.write_text("{")
    elif kind == "params a list":
        params.write_text("[]")
    elif kind == "truncated":
        pth.write_bytes(pth.read_bytes()[:-1000])
    elif kind == "half":
        pth.write_bytes(pth.read_bytes()[: pth.stat().st_size // 2])
    elif kind == "the first 20,000 bytes":  # torch searches for the end in the last 64 KiB
        pth.write_bytes(pth.read_bytes()[:20000])
    elif kind == "empty file":
        pth.write_bytes(b"")
    elif kind == "web page":
        pth.write_bytes(b"<!DOCTYPE html><html><body>Access denied</body></html>")
    elif kind == "pickle bomb":
        torch.save({"a": RunsCode()}, pth)
    elif kind == "bare pickle bomb":
        pth.write_bytes(pickle.dumps(RunsCode()))
    elif kind == "a list":
        torch.save([torch.ones(2)], pth)
    elif kind == "missing":
        del weights["layers.1.attention.wq.weight"]
        torch.save(weights, pth)
    elif kind == "extra":
        torch.save(weights | {"layers.2.attention.wq.weight": torch.ones(1)}, pth)
    elif kind == "wrong shape":
        torch.save(weights | {"norm.weight": torch.ones(63)}, pth)
    elif kind == "integers":
        torch.save(weights | {"norm.weight": torch.ones(64, dtype=torch.int8)}, pth)
    elif kind == "no first shard":
        pth.rename(folder / "consolidated.01.pth")
    elif kind == "params empty":
        params.write_text("{}")
    elif kind == "shards of two models":
        del weights["layers.1.attention.wq.weight"]
        torch.save(weights, folder / "consolidated.01.pth")
    elif kind == "a shard too many":
        torch.save(weights, folder / "consolidated.01.pth")
    else:
        key, _, value = kind.partition("=")
        params.write_text(json.dumps(values | {key: json.loads(value)}))


BAD = {
    "no first shard": (FileNotFoundError, r"no consolidated\.00\.pth"),
    "params empty": (ValueError, r"lacks \['dim', 'n_layers', 'n_heads'\]"),
    "no shards": (FileNotFoundError, r"consolidated.*pth"),
    "no params": (FileNotFoundError, r"params\.json"),
    "params not json": (ValueError, "not JSON"),
    "params a list": (ValueError, "JSON object"),
    "truncated": (ValueError, "get or make it again"),
    "half": (ValueError, "get or make it again"),
    "the first 20,000 bytes": (ValueError, "get or make it again"),
    "empty file": (ValueError, "get or make it again"),
    "web page": (ValueError, r"consolidated\.00\.pth"),
    "pickle bomb": (ValueError, "could run code"),
    "bare pickle bomb": (ValueError, r"consolidated\.00\.pth"),
    "a list": (ValueError, "state dict"),
    "missing": (ValueError, r"missing: layers\.1\.attention\.wq\.weight"),
    "extra": (ValueError, r"unknown: layers\.2\.attention\.wq\.weight"),
    "wrong shape": (ValueError, r"norm\.weight \(63,\) instead of \(64,\)"),
    "integers": (ValueError, r"norm\.weight is torch\.int8"),
    "shards of two models": (ValueError, "not shards of one model"),
    "a shard too many": (ValueError, "wrong shape"),
    "window=5": (ValueError, "'window'"),
    "vision_chunk_size=448": (ValueError, "vision"),
    "dim=0": (ValueError, "dim must be a positive integer"),
    'dim="64"': (ValueError, "dim must be a positive integer"),
    "dim=66": (ValueError, "multiple of n_heads"),
    "dim=128": (ValueError, "wrong shape"),
    "n_heads=3": (ValueError, "n_heads 3"),
    "n_kv_heads=3": (ValueError, "n_kv_heads"),
    "n_kv_heads=0": (ValueError, "n_kv_heads"),
    "n_layers=-1": (ValueError, "n_layers"),
    "n_layers=3": (ValueError, "missing"),
    "norm_eps=0": (ValueError, "norm_eps"),
    "rope_theta=null": (ValueError, "rope_theta"),
    "ffn_dim_multiplier=1e-9": (ValueError, "feed-forward"),
    'use_scaled_rope="yes"': (ValueError, "use_scaled_rope"),
    "vocab_size=1.5": (ValueError, "vocab_size"),
    "vocab_size=301": (ValueError, "wrong shape"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoint(
    tiny_checkpoint: Tiny, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(**SMALL)
    damage(folder, kind)
    monkeypatch.chdir(tmp_path)
    error, message = BAD[kind]
    with pytest.raises(error, match=message):
        load_folder(folder)
    assert not list(tmp_path.iterdir()), "code of the checkpoint was run"


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="ckpt_dir"):
        read_params(tmp_path / "nowhere")


def test_tokenizer_of_another_size(tiny_checkpoint: Tiny, llama3_tokenizer_path: Path) -> None:
    folder = tiny_checkpoint(**SMALL)
    with pytest.raises(ValueError, match="128256 tokens and the model 300"):
        Llama.build(folder, llama3_tokenizer_path, 32, 1, device="cpu")
