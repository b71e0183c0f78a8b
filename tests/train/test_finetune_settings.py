"""finetune_settings.py: defaults by method, and options that exclude each other."""

from __future__ import annotations

from typing import Any

import pytest

from llama.layers.lora import TARGETS, LoRAConfig
from llama.train.finetune_settings import FinetuneSettings


def test_defaults() -> None:
    assert FinetuneSettings().lora == LoRAConfig(rank=8, alpha=16.0, targets=TARGETS)
    assert FinetuneSettings(rank=64, targets="wq, wv").lora == LoRAConfig(
        64, 128.0, 0, ("wq", "wv")
    )
    assert FinetuneSettings(alpha=4.0).lora.scale == 0.5
    rates = {name: FinetuneSettings(method=name).peak_lr for name in ("lora", "full", "dpo")}
    assert rates == {"lora": 2e-4, "full": 2e-5, "dpo": 5e-5}
    assert FinetuneSettings(method="full", lr=1.0).peak_lr == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a positive integer, not 0"),
        ({"alpha": 0.0}, "alpha must be a positive number"),
        ({"dropout": 1.0}, "dropout must be a number from 0 to below 1"),
        ({"targets": "wq,q_proj"}, "targets: q_proj is called wq here"),
        ({"targets": "wq,wx"}, r"targets must be some of wq, .*, not \['wx'\]"),
        ({"targets": ""}, "targets must be some of"),
        ({"method": "ia3"}, "unknown method 'ia3'; use one of lora, full, embeddings, dpo"),
        ({"format": "csv"}, "unknown format 'csv'"),
        ({"template": "vicuna"}, "unknown template 'vicuna'"),
        ({"method": "full", "rank": 16}, "rank is for method lora, not full; leave it out"),
        ({"method": "full", "quantize": "int4"}, "quantized weights cannot be trained; use method"),
        ({"method": "full", "train_embeddings": True}, "trains them anyway"),
        ({"method": "dpo", "pack": True}, "pack and method dpo exclude each other"),
        ({"beta": 0.2}, "beta is for method dpo"),
        ({"quantize": "nf4"}, "unknown scheme 'nf4'"),
        ({"steps": 10, "epochs": 1.0}, "steps and epochs: give one of them"),
        ({"val_data": "x", "val_fraction": 0.1}, "val_data and val_fraction: give one of them"),
        ({"lora_plus": 0.0}, "lora_plus must be a positive number"),
        ({"max_seq_len": 0}, "max_seq_len must be a positive integer"),
        ({"tool_form": "xml"}, "xml"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneSettings(**options)


def test_what_a_resumed_run_may_change() -> None:
    recorded = vars(FinetuneSettings()) | {"ranks": 1}
    assert FinetuneSettings(epochs=5.0, samples=0, recompute=True).differences(recorded, 1) == []
    changed = FinetuneSettings(rank=4, method="dpo").differences(recorded, 2)
    assert changed == [
        "method was lora and is now dpo", "rank was 8 and is now 4", "ranks was 1 and is now 2",
    ]  # fmt: skip
