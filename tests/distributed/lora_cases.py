"""An adapted model on the ranks that run.

    torchrun --nproc_per_node 2 tests/distributed/lora_cases.py DIR

Every rank prints one line of JSON with the logits of each case.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from llama.checkpoints.load import load_model
from llama.checkpoints.open import open_checkpoint
from llama.distributed import tensor_parallel
from llama.layers.lora import add_lora, lora_part, lora_state
from llama.layers.optimize import optimize, quantize_model
from tests.adapters import random_adapter
from tests.exact_products import exact_products

CPU = torch.device("cpu")
CASES = [(scheme, dora) for scheme in (None, "int8", "int4") for dora in (False, True)]


def logits(folder: str, scheme: str | None, dora: bool) -> list[float]:
    """Of the end of a prefill and a decode step, as `Llama.build` makes the model."""
    source = open_checkpoint(folder)
    args = source.args(max_seq_len=16, max_batch_size=2)
    model = load_model(source, args, CPU, torch.float32)
    quantize_model(model, scheme)
    config, weights = random_adapter(1, args, rank=3, alpha=3.0, dora=dora)
    add_lora(model, config)
    rank, size = tensor_parallel.rank(), tensor_parallel.size()
    state = lora_state(model)
    assert set(state) == set(weights)
    for name, whole in weights.items():
        state[name].copy_(lora_part(name, whole, args, rank, size))
    model.eval()
    optimize(model)
    with torch.inference_mode():
        steps = [
            model(torch.arange(18).view(2, 9), 0),
            model(torch.tensor([[1], [2]]), 9),
        ]
    # Few: lines of two ranks that exceed a pipe's room would mix.
    found: list[float] = torch.cat(steps, dim=1)[:, -2:].flatten().tolist()
    return found


@exact_products()
def all_logits(folder: str) -> list[list[float]]:
    return [logits(folder, scheme, dora) for scheme, dora in CASES]


if __name__ == "__main__":
    tensor_parallel.initialize(None, CPU)
    result: dict[str, Any] = {"rank": int(os.environ["RANK"]), "logits": all_logits(sys.argv[1])}
    sys.stdout.write(json.dumps(result) + "\n")
