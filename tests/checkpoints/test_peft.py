"""formats/peft.py and adapter.py: adapters of PEFT read, written, refused.

Oracle: peft and transformers on the base in Hugging Face's layout.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llama import Transformer
from llama.checkpoints.adapter import read_adapter, write_adapter
from llama.checkpoints.formats.peft import LINEARS, adapter_shapes
from llama.checkpoints.open import open_checkpoint
from llama.checkpoints.source import Source
from llama.layers.lora import LoRAConfig

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 512}
CONFIGS = [
    pytest.param(LoRAConfig(rank=4, alpha=8), id="all"),
    pytest.param(LoRAConfig(3, 7.5, targets=("wk", "w2"), rslora=True), id="rslora"),
    pytest.param(LoRAConfig(4, targets=("wq", "wk", "wo", "w1"), dora=True), id="dora"),
]
IDS = [[1, 5, 300, 7, 42, 511, 8]]


@pytest.fixture(scope="module")
def bases(
    tiny_checkpoint: Callable[..., Path],
    byte_tokenizer_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """One model in Meta's and in Hugging Face's layout."""
    from llama.checkpoints.convert import convert

    meta = tiny_checkpoint(**SIZES)
    shutil.copy(byte_tokenizer_path, meta / "tokenizer.model")
    hf = tmp_path_factory.mktemp("base") / "hf"
    convert(meta, hf, "hf")
    return {"meta": meta, "hf": hf}


def random_adapter(
    source: Source, config: LoRAConfig, whole: tuple[str, ...] = (), seed: int = 1
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(weights, whole) that change the logits much."""
    args = source.args()
    generator = torch.Generator().manual_seed(seed)
    rows = dict.fromkeys(whole, args.vocab_size)
    tensors = {
        name: 0.5 + torch.rand(shape, generator=generator)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * 0.1
        for name, shape in adapter_shapes(config, rows, args).items()
    }
    return (
        {name: w for name, w in tensors.items() if name not in whole},
        {name: tensors[name] for name in whole},
    )


def hf_logits(base: Path, adapter: Path | None) -> Tensor:
    """Logits of transformers, with PEFT's adapter."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        logits: Tensor = model.eval()(torch.tensor(IDS)).logits
    return logits


def our_logits(
    source: Source, weights: dict[str, Tensor], whole: dict[str, Tensor], config: LoRAConfig
) -> Tensor:
    """Logits of the plain model with the changed weights, by the formulas of LoRA and DoRA."""
    with torch.no_grad():
        state = {name: source.read(name).clone() for name in source.shapes()} | whole
        for name in weights:
            linear, _, part = name.rpartition(".")
            if part == "lora_a":
                w, a, b = state[f"{linear}.weight"], weights[name], weights[f"{linear}.lora_b"]
                w += config.scale * b @ a
                if config.dora:
                    w *= (weights[f"{linear}.lora_magnitude"] / w.norm(dim=1))[:, None]
        model = Transformer(source.args(max_seq_len=16, max_batch_size=1))
        model.load_state_dict(state)
        logits: Tensor = model.eval()(torch.tensor(IDS), 0)
    return logits


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
