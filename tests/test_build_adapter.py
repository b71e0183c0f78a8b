"""Llama.build with adapters: logits of peft, on plain and quantized bases, on several ranks.

Oracle: peft and transformers on the base in Hugging Face's layout.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from llama import Llama
from llama.checkpoints.adapted import open_adapted
from llama.checkpoints.adapter import write_adapter
from llama.checkpoints.convert import quantize
from llama.checkpoints.merge import merge
from llama.checkpoints.open import open_checkpoint
from llama.layers.lora import LoRAConfig
from llama.model import TransformerBlock
from llama.text.rank_file import default_spec
from tests import adapter_job
from tests.checkpoints.adapters import IDS, bases, hf_logits, random_adapter
from tests.distributed.test_tensor_parallel import torchrun
from tests.vocabularies import rank_file

__all__ = ["bases"]
HALVES = ("tok_embeddings.weight", "output.weight")
LORA, DORA = LoRAConfig(4, 8), LoRAConfig(2, 3, dora=True, targets=("wq", "wk", "wo", "w2"))


@pytest.fixture(scope="module")
def adapters(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of the base: low-rank, DoRA, and with an embedding and an output of its own."""
    source, folder = open_checkpoint(bases["meta"]), tmp_path_factory.mktemp("adapters")
    for name, config, whole in (("lora", LORA, ()), ("dora", DORA, ()), ("whole", LORA, HALVES)):
        (folder / name).mkdir()
        weights, trained = random_adapter(source, config, whole, seed=len(name))
        write_adapter(folder / name, source, config, weights, whole=trained)
    return {path.name: path for path in folder.iterdir()}


def logits(base: Path, **options: Any) -> torch.Tensor:
    llama = Llama.build(base, max_seq_len=16, dtype="fp32", device="cpu", **options)
    with torch.inference_mode():
        found: torch.Tensor = llama.model(torch.tensor(IDS), 0)
    return found


@pytest.mark.parametrize("base", ["meta", "hf"])
@pytest.mark.parametrize("name", ["lora", "dora", "whole"])
@pytest.mark.parametrize("exact", [True, False])
def test_logits_of_peft(
    bases: dict[str, Path], adapters: dict[str, Path], base: str, name: str, exact: bool
) -> None:
    found = logits(bases[base], adapter=adapters[name], exact=exact)
    expected = hf_logits(bases["hf"], adapters[name])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - logits(bases[base])).abs().max() > 0.1


@pytest.mark.parametrize("name", ["lora", "dora", "whole"])
def test_quantized_bases(
    bases: dict[str, Path], adapters: dict[str, Path], name: str, tmp_path: Path
) -> None:
    """Quantized when stored or when built, the base is the same; the adapter is not quantized."""
    quantize(bases["meta"], tmp_path / "int8", "int8")
    stored = logits(tmp_path / "int8", adapter=adapters[name])
    torch.testing.assert_close(
        stored, logits(bases["meta"], adapter=adapters[name], quantize="int8"), atol=1e-5, rtol=0
    )
    expected = hf_logits(bases["hf"], adapters[name])
    assert (stored - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_one_compiled_block_serves_every_layer(
    bases: dict[str, Path], adapters: dict[str, Path], name: str
) -> None:
    llama = Llama.build(bases["meta"], max_seq_len=16, dtype="fp32", adapter=adapters[name])
    counter = CompileCounter()
    block = torch.compile(TransformerBlock.forward, backend=counter)
    freqs = torch.view_as_real(llama.model.freqs_cis[:1])
    with torch.no_grad():
        for layer in llama.model.layers:
            block(layer, torch.ones(1, 1, 64), freqs)  # type: ignore[arg-type]
    assert len(llama.model.layers) == 2 and counter.frame_count == 1


def test_adapters_by_name(
    bases: dict[str, Path], adapters: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    named = {name: adapters[name] for name in ("lora", "dora")}
    with caplog.at_level(logging.INFO, "llama"):
        llama = Llama.build(bases["meta"], max_seq_len=16, dtype="fp32", adapters=named)
    assert f"With the adapter lora, {adapters['lora']}: LoRA of rank 4, alpha 8" in caplog.text
    _, scores = llama.generate(IDS, 0, logprobs=True, echo=True, adapter="dora")
    assert scores is not None
    expected = hf_logits(bases["hf"], adapters["dora"]).log_softmax(-1)[0]
    rows = [float(expected[i, token]) for i, token in enumerate(IDS[0][1:])]
    torch.testing.assert_close(scores[0][1:], rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("same", [True, False])
def test_warning_of_other_tokens(bases: dict[str, Path], tmp_path: Path, same: bool) -> None:
    """Requests that choose an adapter by name get the base's tokenizer."""
    source, own = open_checkpoint(bases["meta"]), (bases["meta"] / "tokenizer.model").read_bytes()
    ranks = own if same else rank_file({bytes([255 - i]): i for i in range(256)})
    weights, _ = random_adapter(source, LORA)
    write_adapter(tmp_path, source, LORA, weights, vocabulary=(ranks, {}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        open_adapted(bases["meta"], None, {"x": tmp_path})
    texts = [str(w.message) for w in caught]
    assert any("adapter x: " in t and "other tokens than the base's" in t for t in texts) != same


def test_refused(bases: dict[str, Path], adapters: dict[str, Path]) -> None:
    base = bases["meta"]
    with pytest.raises(ValueError, match="adapter and adapters exclude each other"):
        Llama.build(base, adapter=adapters["lora"], adapters={"a": adapters["lora"]})
    with pytest.raises(ValueError, match=r"adapter w: .* has tok_embeddings.weight and .*merge it"):
        Llama.build(base, adapters={"w": adapters["whole"]})
    with pytest.raises(TypeError, match="adapter must be the path"):
        Llama.build(base, adapter=3)  # type: ignore[arg-type]
    for wrong in (["a"], {"": adapters["lora"]}, {}, {1: adapters["lora"]}):
        with pytest.raises(TypeError, match="adapters must be a dict of names and folders"):
            Llama.build(base, adapters=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"is an adapter, not a checkpoint"):
        Llama.build(adapters["lora"])


def test_ranks(bases: dict[str, Path], adapters: dict[str, Path]) -> None:
    """Two ranks generate what one does, and refuse different adapters."""
    base = str(bases["meta"])
    cases: dict[str, Any] = {
        "builds": [
            {"ckpt_dir": base, "adapter": str(adapters["lora"])},
            {"ckpt_dir": base, "adapter": str(adapters["dora"])},
            {"ckpt_dir": base, "adapter": str(adapters["whole"]), "quantize": "int8"},
            {"ckpt_dir": base, "adapters": {n: str(adapters[n]) for n in ("lora", "dora")}},
        ],
        "differ": [{"ckpt_dir": base, "adapter": str(adapters[n])} for n in ("lora", "dora")],
    }
    one = adapter_job.main(json.dumps(cases))
    out = torchrun(2, "-m", "tests.adapter_job", json.dumps(cases))
    two = json.loads(out.splitlines()[-1])
    assert "the ranks differ in the adapter" in two["error"]
    for mine, other in zip(one["generated"], two["generated"], strict=True):
        assert mine["ids"] == other["ids"]
        for a, b in zip(mine["logprobs"], other["logprobs"], strict=True):
            for row, same in zip(a, b, strict=True):
                torch.testing.assert_close(row[1:], same[1:], atol=1e-4, rtol=1e-4)


def test_vocabulary_travels_with_the_adapter(bases: dict[str, Path], tmp_path: Path) -> None:
    """More tokens than the base has: ids, texts and rows of the adapter; merged likewise."""
    source = open_checkpoint(bases["meta"])
    weights, _ = random_adapter(source, LORA)
    dim = source.args().dim
    whole = {name: torch.randn(515, dim) * dim**-0.5 for name in HALVES}
    lines = (bases["meta"] / "tokenizer.model").read_bytes()
    sidecar = default_spec("llama3", 256)
    more = b"".join(b"%s %d\n" % (t, 512 + i) for i, t in enumerate((b"YWI=", b"Y2Q=", b"ZWY=")))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(adapter, source, LORA, weights, whole=whole, vocabulary=(lines + more, sidecar))
    llama = Llama.build(bases["meta"], adapter=adapter, max_seq_len=16, dtype="fp32")
    assert llama.tokenizer.encode("abcd", bos=False, eos=False) == [512, 513]
    assert llama.model(torch.tensor([[512, 513]]), 0).shape[-1] == 515
    for to in ("meta", "hf"):
        merge(bases["meta"], adapter, tmp_path / to, to=to)
        merged = Llama.build(tmp_path / to, max_seq_len=16, dtype="fp32")
        assert merged.tokenizer.encode("abcd", bos=False, eos=False) == [512, 513]
        found = merged.model(torch.tensor([[512, 513, 7]]), 0)
        expected = llama.model(torch.tensor([[512, 513, 7]]), 0)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    (adapter / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"515 rows .* the base 512, and no tokenizer; copy"):
        Llama.build(bases["meta"], adapter=adapter)


def test_a_chat_template_travels_with_the_adapter(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    """As trainers of others save it: a tokenizer of Hugging Face beside PEFT's files."""
    adapter = shutil.copytree(adapters["lora"], tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bases["hf"] / name, adapter)
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    llama = Llama.build(bases["meta"], adapter=adapter, max_seq_len=16, dtype="fp32")
    assert llama.formatter is not None
    ids = llama.formatter.encode_dialog_prompt([{"role": "user", "content": "hi"}])
    assert llama.tokenizer.decode(ids) == "<hi>"
    (adapter / "tokenizer.json").write_text('{"model": {"type": "Unigram"}}')
    with pytest.warns(UserWarning, match="a Unigram, not a BPE.* The base's tokenizer is used"):
        Llama.build(bases["meta"], adapter=adapter, max_seq_len=16, dtype="fp32")
