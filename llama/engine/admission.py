"""Who gets a slot before a step, and whose time is over."""

from __future__ import annotations

from llama.engine.request import Event
from llama.engine.slots import Slots
from llama.engine.unfinished import Unfinished


def admit(unfinished: Unfinished, slots: Slots) -> list[Event]:
    """End requests whose time is over; give free slots to those that wait, first come first served.

    Siblings wait until the prompt of the first is computed, and whoever came later waits for them.
    So no other request takes the row that they begin with a copy of.
    """
    events = []
    for generation in unfinished:
        if generation.overdue and generation.finish_reason is None:
            generation.end("timeout")
            events.append(generation.event())
    unfinished.sweep(slots.release)
    placed = {slot.running.id for slot in slots.rows if slot.generation is not None}
    for generation in unfinished:
        if generation.id in placed:
            continue
        if generation.budget == 0 and generation.request.score_from is None:
            generation.end("length")
            events.append(generation.event())
        elif slots.free() and not slots.prefilling(generation.group):
            slots.place(generation)
        else:
            break
    return events
