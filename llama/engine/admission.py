"""Who gets a slot before a step, and whose time is over."""

from __future__ import annotations

from contextlib import AbstractContextManager

from llama.engine.request import Event
from llama.engine.slots import Slots
from llama.engine.unfinished import Unfinished


def admit(unfinished: Unfinished, slots: Slots, lock: AbstractContextManager[bool]) -> list[Event]:
    """End requests whose time is over; give free slots to those that wait, first come first served.

    Siblings wait until the prompt of the first is computed, and whoever came later waits for them.
    So no other request takes the row that they begin with a copy of.

    Args:
        lock: of the engine. It is free while rows are copied, which may take long.
    """
    with lock:
        events = end_at_once(unfinished)
        unfinished.sweep(slots.release)
        placed = {slot.running.id for slot in slots.rows if slot.generation is not None}
        waiting = [generation for generation in unfinished if generation.id not in placed]
    for generation in waiting:
        if generation.finish_reason is not None:  # cancelled meanwhile
            continue
        if not slots.free() or slots.prefilling(generation.group):
            break
        slots.place(generation)
    return events


def end_at_once(unfinished: Unfinished) -> list[Event]:
    """End requests whose time is over, and those that ask for nothing."""
    events = []
    for generation in unfinished:
        if generation.finish_reason is not None:
            continue
        if generation.overdue:
            generation.end("timeout")
            events.append(generation.event())
        elif generation.budget == 0 and generation.request.score_from is None:
            generation.end("length")
            events.append(generation.event())
    return events


def fail_running(slots: Slots, reason: str) -> list[Event]:
    """End all requests that have a slot with an error."""
    events = []
    for slot in slots.rows:
        if slot.generation is not None and slot.generation.finish_reason is None:
            slot.generation.fail(RuntimeError(reason))
            events.append(slot.generation.event())
    return events
