"""Llama.build with adapters: logits of peft, on plain and quantized bases, on several ranks.

Oracle: peft and transformers on the base in Hugging Face's layout.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llama import Llama
from llama.checkpoints.adapter import write_adapter
from llama.checkpoints.open import open_checkpoint
from llama.layers.lora import LoRAConfig
from tests.checkpoints.adapters import IDS, bases, hf_logits, random_adapter

__all__ = ["bases"]


def logits(llama: Llama) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = llama.model(torch.tensor(IDS), 0)
    return found


@pytest.mark.parametrize("base", ["meta", "hf"])
@pytest.mark.parametrize("whole", [(), ("tok_embeddings.weight", "output.weight")])
def test_logits_of_peft(
    bases: dict[str, Path], base: str, whole: tuple[str, ...], tmp_path: Path
) -> None:
    source = open_checkpoint(bases[base])
    weights, trained = random_adapter(source, LoRAConfig(4, 8), whole)
    write_adapter(tmp_path, source, LoRAConfig(4, 8), weights, whole=trained)
    llama = Llama.build(bases[base], adapter=tmp_path, max_seq_len=16, dtype="fp32", device="cpu")
    torch.testing.assert_close(
        logits(llama), hf_logits(bases["hf"], tmp_path), atol=1e-5, rtol=1e-5
    )
