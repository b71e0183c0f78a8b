"""Writes into the generations what a step has computed. Computes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from llama.engine.drawing import NextId
from llama.engine.event import Event
from llama.engine.forward import Chunk, Scores
from llama.engine.request import Generation
from llama.engine.slots import Slot


def record(
    slots: Sequence[Slot],
    chunks: Sequence[Chunk],
    width: int,
    scored: Sequence[Scores],
    drawn: Mapping[int, Sequence[NextId]],
) -> list[Event]:
    """Update the slots and their generations. Each id that was drawn is an event.

    Args:
        chunks: what each slot was fed.
        width, scored, drawn: what `compute` returned for them.
    """
    events = []
    for slot, chunk, scores in zip(slots, chunks, scored, strict=True):
        generation = slot.running
        slot.written = max(slot.written, chunk.start + width)
        found = drawn.get(generation.id, ())
        # Before its end is visible to other threads.
        generation.add_scores(chunk.start, scores.logprobs, scores.top)
        if not all(map(math.isfinite, scores.logprobs)):
            generation.fail(not_a_number(generation))
        elif chunk.whole and not found and generation.finish_reason is None:  # only to be scored
            generation.end("length")
        new = append(generation, found)
        slot.cached += chunk.ids[: chunk.kept(len(found))]
        proposed, accepted = len(chunk.proposal.ids), max(0, len(found) - 1)
        generation.proposed += proposed
        generation.accepted += accepted
        if slot.guesses is not None:
            slot.guesses.learn(proposed, accepted)
        if not new and (chunk.whole or generation.finish_reason is not None):
            new = [generation.event()]
        events += new
    return events


def append(generation: Generation, found: Sequence[NextId]) -> list[Event]:
    """Add drawn ids up to the end of the answer; an event for each, and for an end without one."""
    events: list[Event] = []
    for token, logprob, top, error in found:
        before = len(generation.tokens)
        if not math.isfinite(logprob):
            generation.fail(not_a_number(generation))
        elif error is not None:
            generation.fail(error)
        else:
            generation.append(token, logprob, top)
        if len(generation.tokens) == before:
            return [*events, generation.event()]
        events.append(generation.event(token, logprob))
    return events


def not_a_number(generation: Generation) -> ValueError:
    return ValueError(f"{generation.request.name} made the model's logits not a number")
