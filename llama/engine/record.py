"""Writes into the generations what a step has computed. Computes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from llama.engine.forward import Chunk, NextId, Scores
from llama.engine.request import Event
from llama.engine.slots import Slot


def record(
    slots: Sequence[Slot],
    chunks: Sequence[Chunk],
    width: int,
    scored: Sequence[Scores],
    drawn: Mapping[int, NextId],
) -> list[Event]:
    """Update the slots and their generations.

    Args:
        chunks: what each slot was fed.
        width, scored, drawn: what `compute` returned for them.
    """
    events = []
    for slot, chunk, scores in zip(slots, chunks, scored, strict=True):
        generation = slot.running
        slot.written = max(slot.written, chunk.start + width)
        found = drawn.get(generation.id)
        before = len(generation.tokens)
        # Before its end is visible to other threads.
        generation.add_scores(chunk.start, scores.logprobs, scores.top)
        known = scores.logprobs if found is None else [*scores.logprobs, found.logprob]
        if not all(map(math.isfinite, known)):
            name = generation.request.name
            generation.fail(ValueError(f"{name} made the model's logits not a number"))
        elif found is not None and found.error is not None:
            generation.fail(found.error)
        elif found is not None:
            generation.append(found.token, found.logprob, found.top)
        elif chunk.whole and generation.finish_reason is None:  # it was only to be scored
            generation.end("length")
        slot.cached += chunk.ids
        if chunk.whole or generation.finish_reason is not None:
            if found is not None and len(generation.tokens) > before:
                events.append(generation.event(found.token, found.logprob))
            else:
                events.append(generation.event())
    return events
