"""formats/peft.py and adapter.py: adapters of PEFT read, written, refused.

Oracle: peft and transformers on the base in Hugging Face's layout.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama import Llama
from llama.checkpoints.adapter import read_adapter, write_adapter
from llama.checkpoints.formats.peft import LINEARS
from llama.checkpoints.open import open_checkpoint
from llama.layers.lora import LoRAConfig
from tests.checkpoints.adapters import (
    CONFIGS,
    IDS,
    bases,
    hf_logits,
    our_logits,
    peft,
    random_adapter,
    transformers,
)

__all__ = ["bases"]


@pytest.mark.parametrize("whole", [(), ("tok_embeddings.weight", "output.weight")])
@pytest.mark.parametrize("config", CONFIGS)
def test_peft_reads_what_is_written(
    bases: dict[str, Path], config: LoRAConfig, whole: tuple[str, ...], tmp_path: Path
) -> None:
    source = open_checkpoint(bases["meta"])
    weights, trained = random_adapter(source, config, whole)
    write_adapter(tmp_path, source, config, weights, whole=trained)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = hf_logits(bases["hf"], tmp_path)
    torch.testing.assert_close(
        found, our_logits(source, weights, trained, config), atol=1e-5, rtol=1e-5
    )
    assert (found - hf_logits(bases["hf"], None)).abs().max() > 0.1
    again = read_adapter(tmp_path, source)
    assert again.config == config
    for read, written in ((again.weights, weights), (again.whole, trained)):
        assert read.keys() == written.keys()
        assert all(torch.equal(read[name], w) for name, w in written.items())


@pytest.mark.parametrize("config", CONFIGS)
def test_adapters_of_peft(bases: dict[str, Path], config: LoRAConfig, tmp_path: Path) -> None:
    """Read with the logits of peft; written again, peft reads equal tensors."""
    names = {ours: theirs for theirs, ours in LINEARS.items()}
    model = transformers.AutoModelForCausalLM.from_pretrained(bases["hf"], dtype=torch.float32)
    made = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=[names[target] for target in config.targets],
            use_rslora=config.rslora,
            use_dora=config.dora,
            init_lora_weights=False,  # B is not 0
            modules_to_save=["lm_head"],
        ),
    )
    with torch.no_grad():
        for name, w in made.named_parameters():
            if "magnitude" in name or "modules_to_save" in name:
                w.mul_(1.5)
        expected = made.eval()(torch.tensor(IDS)).logits
    made.save_pretrained(tmp_path / "theirs")
    source = open_checkpoint(bases["meta"])
    adapter = read_adapter(tmp_path / "theirs", source)
    assert adapter.config == config and list(adapter.whole) == ["output.weight"]
    found = our_logits(source, adapter.weights, adapter.whole, config)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    (tmp_path / "ours").mkdir()
    write_adapter(tmp_path / "ours", source, config, adapter.weights, whole=adapter.whole)
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("theirs", "ours"))
    assert one.keys() == other.keys()
    assert all(torch.equal(w, other[name]) for name, w in one.items())


def test_peft_ties_what_is_written(bases: dict[str, Path], tmp_path: Path) -> None:
    config = LoRAConfig(2, 4, targets=("wv",))
    source = open_checkpoint(bases["tied meta"])
    weights, whole = random_adapter(source, config, ("tok_embeddings.weight",))
    whole["output.weight"] = whole["tok_embeddings.weight"]
    write_adapter(tmp_path, source, config, weights, whole=whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = hf_logits(bases["tied hf"], tmp_path)
    expected = our_logits(source, weights, whole, config)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("modules", "tied"),
    [(["embed_tokens"], True), (["embed_tokens"], False), (["lm_head"], False)],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_adapters_of_a_tied_base(
    bases: dict[str, Path], modules: list[str], tied: bool, tmp_path: Path
) -> None:
    """In PEFT one half is trained alone, unless the adapter asks to tie both."""
    model = transformers.AutoModelForCausalLM.from_pretrained(bases["tied hf"], dtype=torch.float32)
    options = {"modules_to_save": modules, "ensure_weight_tying": tied, "init_lora_weights": False}
    made = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], **options))
    with torch.no_grad():
        for name, w in made.named_parameters():
            if "modules_to_save" in name:
                w.mul_(1.3)
        expected = made.eval()(torch.tensor(IDS)).logits
    made.save_pretrained(tmp_path)
    llama = Llama.build(bases["tied meta"], adapter=tmp_path, dtype="fp32", max_seq_len=16)
    with torch.inference_mode():
        found = llama.model(torch.tensor(IDS), 0)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
