"""A decoding step from ids to ids: on CUDA one transfer in, one graph, one transfer out.

What a row needs is one row of a small tensor: its id, position, sampling and random number. So
the host waits once in a step, for the ids that were drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama.engine.compiled_step import CompiledStep
from llama.engine.sampling import Sampling, sample_rows, uniform_of, without

ALL = 1 << 31  # a top_k that no vocabulary exceeds


class Row(NamedTuple):
    """What decides a row's next id.

    Attributes:
        token: the id drawn last, not cached yet.
        position: of that id.
        generator: on the CPU; None draws from torch's global generator.
    """

    token: int
    position: int
    sampling: Sampling
    generator: torch.Generator | None

    @property
    def greedy(self) -> bool:
        return self.sampling.greedy


class Drawn(NamedTuple):
    """The next id of a row.

    Attributes:
        logprob: of the id, before temperature and top_p.
        finite: whether the logits of the ids that may be drawn are finite.
    """

    token: int
    logprob: float
    finite: bool


def draw_rows(step: CompiledStep, rows: Sequence[Row]) -> list[Drawn]:
    """Feed rows 0 to B - 1 of the cache, and draw the next id of each."""
    random = [row for row in rows if not row.greedy]
    seeded = any(row.generator is not None for row in random)
    from_global = any(row.generator is None for row in random)
    length = step.length(max(row.position for row in rows) + 1)

    def run(packed: Tensor) -> Tensor:
        tokens, start_pos = packed.narrow(1, 0, 2).long().unbind(1)
        *settings, uniform = packed.narrow(1, 2, 5).float().unbind(1)
        h = step.hidden(tokens.unsqueeze(1), start_pos, length).squeeze(1)
        logits = step.model.logits(h)
        allowed = without(logits, step.unused)
        finite = allowed.amax(-1).isfinite()
        allowed = allowed.where(finite.unsqueeze(-1), 0.0)  # drawing would fail, for all rows
        ids = sample_rows(allowed, settings, uniform if seeded else None, from_global)
        chosen = logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        return torch.stack((ids.double(), chosen.double(), finite.double()), dim=1)

    device = step.model.norm.weight.device
    numbers = [pack(row) for row in rows]
    packed = torch.tensor(numbers, dtype=torch.float64, pin_memory=device.type == "cuda")
    key = ("draw", len(rows), length, seeded, from_global)
    out = step.repeat(key, run, packed.to(device, non_blocking=True))
    return [Drawn(int(token), logprob, finite > 0) for token, logprob, finite in out.tolist()]


def pack(row: Row) -> list[float]:
    """A row as numbers; -1 is no random number of its own."""
    how, uniform = row.sampling, -1.0
    if row.generator is not None and not row.greedy:
        uniform = uniform_of(row.generator)
    top_k = min(how.top_k, ALL)
    return [row.token, row.position, how.temperature, how.top_p, top_k, how.min_p, uniform]
