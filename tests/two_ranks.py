"""Run by torchrun in test_parallel.py: generate on all ranks, print what each one got.

The ranks' generators are made to differ: the drawn ids must be one rank's all the same.
"""

from __future__ import annotations

import json
import sys

import torch

from llama import Llama, parallel

ckpt_dir, tokenizer_path = sys.argv[1:]
llama = Llama.build(ckpt_dir, tokenizer_path, 64, 2, device="cpu", dtype=torch.float32)
prompts = [[128000, 9, 8, 7], [128000, *range(500, 520)]]
greedy, scores = llama.generate(prompts, 10, temperature=0, logprobs=True, echo=True)
if parallel.rank() > 0:
    torch.manual_seed(99)
sampled, _ = llama.generate(prompts, 10, temperature=1.0)
result = {"rank": parallel.rank(), "greedy": greedy, "scores": scores, "sampled": sampled}
sys.stdout.write(json.dumps(result) + "\n")
