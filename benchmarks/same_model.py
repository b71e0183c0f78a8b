"""Check that the systems compute the same model: fp32 logits of a small one with the same heads.

Also writes the weights. `Preparation` does both in a process that ends before the timing.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.ours import random_prompts
from benchmarks.peers import (
    OURS,
    SYSTEMS,
    TRANSFORMERS,
    Job,
    System,
    make_system,
    write_weights,
)
from benchmarks.random_checkpoint import RandomSource
from llama.checkpoints.open import open_checkpoint
from llama.checkpoints.source import Source
from llama.distributed.device import pick_device

LAYERS, VOCABULARY = 2, 1024  # upper bounds
PROMPT, SINGLE = 192, 4  # ids computed at once, then ids computed one by one
TOLERANCE = 1e-3  # relative to the largest logit


@torch.inference_mode()
def cached_logits(system: System, ids: list[list[int]]) -> Tensor:
    """(1 + SINGLE, B, V) logits: after the prompt, and after each id that follows it."""
    tokens = torch.tensor(ids, device=pick_device(None))
    found = [system.forward(tokens[:, :PROMPT], 0).cpu().clone()]
    for i in range(PROMPT, PROMPT + SINGLE):
        found.append(system.forward(tokens[:, i : i + 1], i).cpu().clone())
    return torch.stack(found)


def small(job: Job, folder: Path) -> Job:
    """The same job with few layers and a small vocabulary, in fp32."""
    params: dict[str, Any] = job.params | {
        "n_layers": min(LAYERS, job.params["n_layers"]),
        "vocab_size": min(VOCABULARY, job.params["vocab_size"]),
    }
    return replace(
        job,
        params=params,
        folder=folder,
        dtype="float32",
        length=PROMPT + SINGLE,
        precise=True,
    )


def unquantized(name: str) -> str:
    """The system of the same program with weights as stored."""
    program = SYSTEMS[name][0]
    if program == TRANSFORMERS:
        return name
    return next(n for n, system in SYSTEMS.items() if system == (program, None))


def differences(job: Job, names: list[str]) -> dict[str, float]:
    """{name: largest difference of its logits, relative to the largest logit}.

    Compares with Meta's code if it is among the peers, else with this library. A quantized system
    is represented by the unquantized one.

    Raises:
        ValueError: a difference is too large for rounding.
    """
    with TemporaryDirectory(dir=job.folder) as folder:
        reduced = small(job, Path(folder))
        kinds = {name: unquantized(name) for name in [OURS, *names]}
        write_weights(reduced, RandomSource(reduced.params), list(kinds.values()))
        ids = random_prompts(reduced.params["vocab_size"], [reduced.length] * job.rows)
        logits = {
            kind: cached_logits(make_system(kind, reduced), ids)
            for kind in dict.fromkeys(kinds.values())
        }
    expected = logits.get("meta", logits[OURS])
    found = {}
    for name, kind in kinds.items():
        found[name] = float((logits[kind] - expected).abs().max() / expected.abs().max())
        if not found[name] <= TOLERANCE:  # also true of NaN
            raise ValueError(
                f"{name} computes another model: its float32 logits differ by {found[name]:.2g} "
                f"of the largest logit; rounding explains at most {TOLERANCE}"
            )
    return found


class Preparation:
    """The work before the timing, as an object for a `Worker`."""

    def run(self, job: Job, weights: Source | Path, names: list[str]) -> dict[str, float]:
        """Check the systems, write the weights (of a checkpoint), return `differences`."""
        found = differences(job, names)
        source = weights if isinstance(weights, Source) else open_checkpoint(weights)
        write_weights(job, source, names)
        return found
