"""Answers with speculation, for test_speculation_ranks.py.

    torchrun --nproc_per_node 2 tests/distributed/speculation_cases.py DIR

Every rank prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from llama import Llama, Request, Sampling

PROMPTS = [[1, 2, 3, 4] * 6, [9, 9, 7] * 4]
HOW = [Sampling(0.0), Sampling(0.7, 0.95), Sampling(0.0, frequency_penalty=0.2)]


def answers(folder: str, speculate: bool = True) -> dict[str, Any]:
    """Two rows at a time; what was proposed and accepted; why a draft is refused."""
    options: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "speculate": speculate}
    llama = Llama.build(folder, None, 96, 2, **options)
    found: dict[str, Any] = {"ids": []}
    for how in HOW:
        requests = [Request(p, 40, how, seed=i, logprobs=True) for i, p in enumerate(PROMPTS)]
        found["ids"] += [generation.ids for generation in llama.engine.run(requests)]
    now = llama.engine.metrics()
    try:
        Llama.build(folder, None, 96, draft=folder)
        found["refused"] = ""
    except ValueError as error:
        found["refused"] = str(error)
    return found | {"proposed": now.proposed_tokens, "accepted": now.accepted_tokens}


if __name__ == "__main__":
    result = {"rank": int(os.environ["RANK"])} | answers(sys.argv[1])
    sys.stdout.write(json.dumps(result) + "\n")
