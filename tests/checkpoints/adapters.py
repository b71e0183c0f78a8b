"""Adapters of a tiny base with random weights, and the logits that transformers computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama import Transformer
from llama.checkpoints.adapter import adapter_shapes
from llama.checkpoints.convert import convert
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
HF_Q = "base_model.model.model.layers.0.self_attn.q_proj"
IDS = [[1, 5, 300, 7, 42, 498, 8]]


@pytest.fixture(scope="module")
def bases(
    tiny_checkpoint: Callable[..., Path],
    byte_tokenizer_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """One model in Meta's and in Hugging Face's layout, and one with tied weights in both."""
    folders: dict[str, Path] = {}
    for kind in ("", "tied "):
        meta = tiny_checkpoint(**SIZES)
        if kind:
            state = torch.load(meta / "consolidated.00.pth")
            state["output.weight"] = state["tok_embeddings.weight"]
            torch.save(state, meta / "consolidated.00.pth")
        shutil.copy(byte_tokenizer_path, meta / "tokenizer.model")
        hf = tmp_path_factory.mktemp("base") / "hf"
        convert(meta, hf, "hf")
        folders |= {f"{kind}meta": meta, f"{kind}hf": hf}
    return folders


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
