"""merge.py: sums in fp32 with one rounding, equal to the adapter and to peft's merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llama import Llama
from llama.checkpoints.adapter import write_adapter
from llama.checkpoints.convert import convert, quantize
from llama.checkpoints.merge import merge
from llama.checkpoints.open import open_checkpoint
from llama.layers.lora import LoRAConfig
from tests.checkpoints.adapters import (
    CONFIGS,
    IDS,
    bases,
    hf_logits,
    peft,
    random_adapter,
    transformers,
)
from tests.checkpoints.gguf_files import vocabulary_keys, weights, write_gguf

__all__ = ["bases"]
CONFIG = LoRAConfig(4, 8)
HALVES = ("tok_embeddings.weight", "output.weight")


def make_adapter(
    base: Path, folder: Path, config: LoRAConfig = CONFIG, whole: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    source = open_checkpoint(base)
    weights, trained = random_adapter(source, config, whole)
    folder.mkdir()
    write_adapter(folder, source, config, weights, whole=trained)
    return weights


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
    llama = Llama.build(folder, adapter=adapter, max_seq_len=16, dtype="fp32", device="cpu")
    with torch.inference_mode():
        found: torch.Tensor = llama.model(torch.tensor(IDS), 0)
    return found


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("to", ["meta", "hf"])
def test_merged_equals_adapter_and_peft(
    bases: dict[str, Path], config: LoRAConfig, to: str, tmp_path: Path
) -> None:
    base, adapter, out = bases["meta"], tmp_path / "adapter", tmp_path / "out"
    make_adapter(base, adapter, config, HALVES)
    before = content(base) | content(adapter)
    merge(base, adapter, out, to=to)
    assert content(base) | content(adapter) == before
    found = logits(out)
    torch.testing.assert_close(found, logits(base, adapter), atol=1e-5, rtol=1e-5)
    model = transformers.AutoModelForCausalLM.from_pretrained(bases["hf"], dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(IDS)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if to == "hf":
        torch.testing.assert_close(hf_logits(out, None), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [None, "fp16"])
@pytest.mark.parametrize("shards", [1, 2])
def test_one_rounding(
    bases: dict[str, Path], dtype: str | None, shards: int, tmp_path: Path
) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    convert(bases["meta"], base, mp=shards, dtype="bf16")
    tensors = make_adapter(base, adapter)
    merge(base, adapter, out, dtype=dtype)
    before, after = open_checkpoint(base), open_checkpoint(out)
    assert after.n_shards == shards
    for name in before.shapes():
        w, linear = before.read(name), name.removesuffix(".weight")
        if f"{linear}.lora_a" in tensors:
            change = tensors[f"{linear}.lora_b"] @ tensors[f"{linear}.lora_a"]
            w = w.float() + CONFIG.scale * change
        expected = w.to(torch.bfloat16 if dtype is None else torch.float16)
        assert torch.equal(after.read(name), expected), name


@pytest.mark.parametrize("equal", [True, False])
def test_tied_stays_tied(bases: dict[str, Path], equal: bool, tmp_path: Path) -> None:
    """A tied base stays tied unless the halves were trained apart."""
    base, adapter, out = bases["tied meta"], tmp_path / "a", tmp_path / "out"
    source = open_checkpoint(base)
    assert source.tied
    weights, whole = random_adapter(source, CONFIG, HALVES)
    if equal:
        whole["output.weight"] = whole["tok_embeddings.weight"]
    adapter.mkdir()
    write_adapter(adapter, source, CONFIG, weights, whole=whole)
    for to in ("meta", "hf"):
        merge(base, adapter, out, to=to, force=True)
        assert open_checkpoint(out).tied == equal
        torch.testing.assert_close(logits(out), logits(base, adapter), atol=1e-5, rtol=1e-5)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is equal


def test_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    base, adapter, out = bases["meta"], tmp_path / "adapter", tmp_path / "out"
    make_adapter(base, adapter)
    quantize(base, tmp_path / "int8", "int8")
    with pytest.raises(ValueError, match=r"is quantized .*merge into the original checkpoint"):
        merge(tmp_path / "int8", adapter, out)
    with pytest.raises(ValueError, match="give the base first"):
        merge(adapter, base, out)
    with pytest.raises(ValueError, match="contains what is read"):
        merge(base, adapter, adapter)
    silent = tmp_path / "silent"
    shutil.copytree(base, silent, ignore=lambda *_: {"tokenizer.model"})
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):  # while it is written
        merge(silent, adapter, out, to="hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "int8", "silent"]
    out.mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        merge(base, adapter, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a folder of checkpoint files only"):
        merge(base, adapter, out, force=True)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_gguf(tmp_path: Path) -> None:
    """A GGUF's weights are dequantized; the merged checkpoint is in bf16 unless asked otherwise."""
    small = {n: 0.05 * w if w.ndim > 1 else 1 + 0.1 * w for n, w in weights().items()}
    base = write_gguf(tmp_path / "base.gguf", small, vocabulary_keys("smollm"))
    adapter = tmp_path / "adapter"
    make_adapter(base, adapter)
    merge(base, adapter, tmp_path / "out")
    merge(base, adapter, tmp_path / "hf", to="hf", dtype="fp32")
    assert open_checkpoint(tmp_path / "out").dtype("layers.0.attention.wq.weight") == torch.bfloat16
    expected = logits(base, adapter)
    torch.testing.assert_close(logits(tmp_path / "hf"), expected, atol=1e-5, rtol=1e-5)
