"""Compares compiled with plain decoding; prints one JSON object.

test_compiled_step.py runs it in its own process: inductor must be the first to import distutils.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from llama import Llama
from llama.engine.forward import hidden_of_chunks

PROMPTS = ["one two three", "a", "some more words than the others have", "b c", "d"]


def build(folder: Path, tokenizer: Path, **options: Any) -> Llama:
    return Llama.build(folder, tokenizer, 300, 3, device="cpu", dtype=torch.float32, **options)


def difference(a: Llama, b: Llama) -> float:
    """Largest difference of logits in a decoding step at three positions, one of them over 256."""
    starts, step = [260, 3, 17], [[5], [6], [7]]
    logits = []
    with torch.inference_mode():
        for llama in (a, b):
            tokens = torch.arange(3 * 260).view(3, 260) % 500
            model, engine = llama.model, llama.engine
            model.hidden(tokens, 0, engine.cache)
            h = hidden_of_chunks(model, engine.cache, step, starts, 0, engine.compiled)
            logits.append(model.logits(h))
    return float((logits[0] - logits[1]).abs().max())


def answers(llama: Llama) -> list[list[int]]:
    """Greedy ids of prompts of different lengths, of which three run at a time; one is over 256."""
    prompts = [llama.tokenizer.encode(text, bos=True, eos=False) for text in PROMPTS]
    rows = [*prompts, list(range(100, 350))]
    return llama.generate(rows, max_gen_len=12, temperature=0.0)[0]


def main(folder: Path, tokenizer: Path, quantize: str | None) -> None:
    torch.manual_seed(0)
    plain = build(folder, tokenizer, quantize=quantize)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = build(folder, tokenizer, quantize=quantize, compile=True)
    at_build = counters["stats"]["unique_graphs"]
    result = {
        "warnings": [str(w.message) for w in caught if "not compiled" in str(w.message)],
        "compiled": compiled.engine.compiled is not None,
        "left_in_cache": max(float(c.k.abs().max()) for c in compiled.engine.cache),
        "graphs": at_build,
        "same_ids": answers(plain) == answers(compiled),
        "difference": difference(plain, compiled),
        "graphs_later": counters["stats"]["unique_graphs"] - at_build,
    }
    tensors = [compiled.model.norm.weight, compiled.engine.cache[0].k]
    references = [weakref.ref(t) for t in tensors]
    gc.collect()
    gc.disable()
    del compiled, tensors
    result["freed"] = [reference() is None for reference in references]
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
