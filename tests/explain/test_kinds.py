"""Traces of models of every kind: the logits are those of the loaded model as it is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.checkpoints.adapter import write_adapter
from llama.checkpoints.open import open_checkpoint
from llama.explain.trace import Trace
from llama.generation import weight_bytes
from llama.layers.adapter_rows import selected
from llama.layers.joined import JoinedHeads
from llama.layers.lora import LoRAConfig
from llama.layers.optimize import JOINED
from llama.layers.replace import replace_modules
from tests.checkpoints.adapters import bases, random_adapter

__all__ = ["bases"]
IDS = [1, 5, 300, 7, 42, 300, 8]
LORA, DORA = LoRAConfig(4, 8), LoRAConfig(2, 3, dora=True, targets=("wq", "wk", "wo", "w2"))


def build(folder: Path, **options: Any) -> Llama:
    settings: dict[str, Any] = {"device": "cpu", "dtype": "fp32", "max_seq_len": 16} | options
    return Llama.build(folder, **settings)


def logits(llama: Llama, adapter: str | None = None) -> torch.Tensor:
    with torch.no_grad(), selected(llama.model, [adapter]):
        found: torch.Tensor = llama.model(torch.tensor([IDS]))[0]
    return found


def total(trace: Trace, key: str) -> int:
    return sum(getattr(stage, key) for stage in trace.stages)


@pytest.fixture(scope="module")
def folders(
    bases: dict[str, Path],
    tiny_checkpoint: Callable[..., Path],
    byte_tokenizer_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """The bases, and one with scaled RoPE and sizes that int4 can store."""
    wide = tiny_checkpoint(vocab_size=512, multiple_of=64, use_scaled_rope=True)
    shutil.copy(byte_tokenizer_path, wide / "tokenizer.model")
    tied = tmp_path_factory.mktemp("tied") / "wide"
    shutil.copytree(wide, tied)
    weights = torch.load(tied / "consolidated.00.pth")
    weights["output.weight"] = weights["tok_embeddings.weight"]
    torch.save(weights, tied / "consolidated.00.pth")
    return bases | {"wide": wide, "tied wide": tied}


@pytest.fixture(scope="module")
def adapters(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    source, folder = open_checkpoint(bases["meta"]), tmp_path_factory.mktemp("adapters")
    for name, config in (("lora", LORA), ("dora", DORA)):
        (folder / name).mkdir()
        write_adapter(folder / name, source, config, random_adapter(source, config)[0])
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("base", "options", "storage", "atol"),
    [
        ("meta", {}, "float32", 1e-4),
        ("hf", {"exact": True}, "float32", 1e-4),
        ("tied meta", {}, "float32", 1e-4),
        ("meta", {"dtype": "bf16"}, "bfloat16", 0.15),
        ("meta", {"quantize": "int8"}, "int8", 1e-4),
        ("wide", {"quantize": "int4"}, "int4", 1e-4),
        ("tied wide", {"quantize": "int4"}, "int4", 1e-4),
        ("tied meta", {"quantize": "int8", "dtype": "bf16"}, "int8", 0.15),
        ("wide", {"dtype": "fp16"}, "float16", 0.02),
    ],
    ids=str,
)
def test_checkpoints(
    folders: dict[str, Path], base: str, options: dict[str, Any], storage: str, atol: float
) -> None:
    with build(folders[base], **options) as llama:
        trace = llama.explain(IDS)
        torch.testing.assert_close(trace.logits, logits(llama), atol=atol, rtol=1e-4)
        assert total(trace, "bytes") == weight_bytes(llama.model)
        whole = sum(
            torch.Size(shape).numel() for shape in open_checkpoint(folders[base]).shapes().values()
        )
        tied = base.startswith("tied")
        assert total(trace, "parameters") == whole - tied * 512 * 64
        kinds = {stage.module: stage.storage for stage in trace.stages}
        assert kinds["Attention.wq"] == storage
        if storage == "int4":
            copied = ", a copy of the embedding" * tied
            assert kinds["Transformer.output"] == f"int6{copied}"
        assert ("embedding" in kinds["Transformer.output"]) == tied
        assert storage in trace.to_html() and torch.isfinite(trace.attention).all()


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_an_adapter(
    bases: dict[str, Path], adapters: dict[str, Path], name: str, quantize: str | None
) -> None:
    with build(bases["meta"], adapter=adapters[name], quantize=quantize) as llama:
        trace = llama.explain(IDS)
        torch.testing.assert_close(trace.logits, logits(llama), atol=1e-4, rtol=1e-4)
        assert total(trace, "bytes") == weight_bytes(llama.model)
        with build(bases["meta"], quantize=quantize) as plain:
            base = plain.explain(IDS)
        assert (trace.logits - base.logits).abs().max() > 0.1
        added = sum(p.numel() for n, p in llama.model.named_parameters() if ".lora_" in n)
        assert total(trace, "parameters") == total(base, "parameters") + added
        low_rank = [p for n, p in llama.model.named_parameters() if n.endswith(("_a", "_b"))]
        more = 2 * len(IDS) * sum(p.numel() for p in low_rank)
        assert total(trace, "operations") == total(base, "operations") + more
        assert any("+ LoRA" in stage.storage for stage in trace.stages)


@pytest.fixture(scope="module")
def many(bases: dict[str, Path], adapters: dict[str, Path]) -> Iterator[Llama]:
    with build(bases["meta"], adapters=adapters) as llama:
        yield llama


@pytest.mark.parametrize("name", [None, "lora", "dora"])
def test_named_adapters(many: Llama, name: str | None) -> None:
    """Whatever the engine has selected meanwhile."""
    with selected(many.model, ["lora", None, "dora"]):
        trace = many.explain(IDS, adapter=name)
    torch.testing.assert_close(trace.logits, logits(many, name), atol=1e-4, rtol=1e-4)
    assert any("+ LoRA" in stage.storage for stage in trace.stages) == (name is not None)


def test_an_unknown_adapter(many: Llama) -> None:
    with pytest.raises(ValueError, match="there is no adapter 'x'; use one of"):
        many.explain(IDS, adapter="x")


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_joined_linears(folders: dict[str, Path], quantize: str | None) -> None:
    """As on a GPU, where queries, keys and values are one matmul."""
    with build(folders["wide"], quantize=quantize, exact=True) as llama:
        before = llama.explain(IDS)
        replace_modules(llama.model, JOINED)
        joined = isinstance(llama.model.layers[0].get_submodule("attention"), JoinedHeads)
        assert joined
        after = llama.explain(IDS)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-4, rtol=1e-4)
    assert [s.parameters for s in after.stages] == [s.parameters for s in before.stages]
    assert [s.bytes for s in after.stages] == [s.bytes for s in before.stages]
