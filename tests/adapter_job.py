"""A command that test_build_adapter.py runs on one rank and on several: builds with adapters.

    torchrun --nproc_per_node 2 -m tests.adapter_job JSON

JSON: {"builds": [keyword arguments of Llama.build, ...], "differ": [one for each rank]}
"""

from __future__ import annotations

import json
import sys
from typing import Any

from llama import Llama
from llama.distributed import tensor_parallel
from tests.exact_products import exact_products

IDS = [[1, 5, 300, 7, 42, 511, 8], [3, 2, 1]]


def build(options: dict[str, Any]) -> Llama:
    return Llama.build(max_seq_len=32, max_batch_size=2, device="cpu", dtype="fp32", **options)


def generate(options: dict[str, Any]) -> dict[str, Any]:
    """Greedy ids and their log-probabilities, those of the prompt too."""
    llama, adapters = build(options), options.get("adapters", {})
    more = [{"adapter": name} for name in adapters] or [{}]
    found = [llama.generate(IDS, 8, 0.0, logprobs=True, echo=True, **m) for m in more]
    return {"ids": [ids for ids, _ in found], "logprobs": [scores for _, scores in found]}


@exact_products()
def main(arguments: str) -> dict[str, Any]:
    """The results of all builds, and the error where the ranks have different adapters."""
    cases = json.loads(arguments)
    results: dict[str, Any] = {"generated": [generate(options) for options in cases["builds"]]}
    if tensor_parallel.size() > 1:
        try:
            build(cases["differ"][tensor_parallel.rank()])
        except ValueError as e:
            results["error"] = str(e)
    return results


if __name__ == "__main__":
    out = main(sys.argv[1])
    if tensor_parallel.rank() == 0:
        print(json.dumps(out))
