"""Whether the systems compute the same model, told in fp32 on a small one with the same heads.

Also writes the weights. Both are done in a process of their own, which ends before the timing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.generation import random_prompts
from benchmarks.peers import OURS, Job, System, make, write_weights
from llama.distributed.device import pick_device

LAYERS, VOCABULARY = 2, 1024  # at most
PROMPT, SINGLE = 192, 4  # ids: so many at once, then so many one by one
TOLERANCE = 1e-3  # of the largest logit


@torch.inference_mode()
def cached_logits(system: System, ids: list[list[int]]) -> Tensor:
    """(1 + SINGLE, B, V): after the prompt, and after each id that follows it."""
    tokens = torch.tensor(ids, device=pick_device(None))
    found = [system.forward(tokens[:, :PROMPT], 0).cpu().clone()]
    for i in range(PROMPT, PROMPT + SINGLE):
        found.append(system.forward(tokens[:, i : i + 1], i).cpu().clone())
    return torch.stack(found)


def small(job: Job, folder: Path) -> Job:
    """The job of a small model: its heads and widths, in fp32 and not quantized."""
    params: dict[str, Any] = job.params | {
        "n_layers": min(LAYERS, job.params["n_layers"]),
        "vocab_size": min(VOCABULARY, job.params["vocab_size"]),
    }
    return replace(
        job,
        params=params,
        folder=folder,
        dtype="float32",
        quantize=None,
        length=PROMPT + SINGLE,
        precise=True,
    )


def differences(job: Job, names: list[str]) -> dict[str, float]:
    """{name: the largest difference of its logits, as a part of the largest logit}.

    The measure is Meta's code if it is among the peers, and this library if not. A quantized system
    is told by its unquantized self.

    Raises:
        ValueError: a difference that rounding does not explain.
    """
    with TemporaryDirectory(dir=job.folder) as folder:
        little = small(job, Path(folder))
        alias = {"llama.cpp-bf16": "llama.cpp", "bf16": OURS}
        kinds = {name: alias.get(name, name) for name in [OURS, *names]}
        write_weights(little, list(kinds.values()))
        ids = random_prompts(little.params["vocab_size"], [little.length] * job.rows)
        logits = {
            kind: cached_logits(make(kind, little), ids) for kind in dict.fromkeys(kinds.values())
        }
    expected = logits.get("reference", logits[OURS])
    found = {}
    for name, kind in kinds.items():
        found[name] = float((logits[kind] - expected).abs().max() / expected.abs().max())
        if not found[name] <= TOLERANCE:  # nor not a number
            raise ValueError(
                f"{name} computes another model: its logits differ by {found[name]:.2g} of the "
                f"largest in float32, and rounding by less than {TOLERANCE}"
            )
    return found


class Preparation:
    """What is done before the timing, as an object for a `Worker`."""

    def run(self, job: Job, names: list[str]) -> dict[str, float]:
        """Write the weights; `differences`."""
        found = differences(job, names)
        write_weights(job, [OURS, *names])
        return found
