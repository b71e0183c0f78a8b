"""The requests of an engine that have not ended, in their order. Knows no cache and no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from llama.common.errors import QueueFull
from llama.distributed import tensor_parallel
from llama.engine.metrics import EngineMetrics
from llama.engine.request import Generation, Request


class Unfinished:
    """Requests by id, first come first. All its methods but `waiting` need the engine's lock.

    Only this says who has ended (those with a finish_reason, until `sweep`) and who waits (those
    without a slot): an interrupt between two such lists would make them disagree.

    Attributes:
        added: how many requests were ever added; the last one's id.
        past: totals of the requests that were swept.
    """

    def __init__(self, slots: int, room: int):
        self.slots, self.room = slots, room
        self.added = 0
        self.past = EngineMetrics(slots=slots)
        self._requests: dict[int, Generation] = {}

    def __iter__(self) -> Iterator[Generation]:
        return iter(list(self._requests.values()))

    def get(self, id: int) -> Generation | None:
        """The request with this id; None if it was swept."""
        return self._requests.get(id)

    @property
    def left(self) -> int:
        """How many have not ended."""
        return sum(generation.finish_reason is None for generation in self)

    @property
    def waiting(self) -> int:
        """For how many of them no slot is left."""
        return max(0, self.left - self.slots)

    def add(self, generations: Sequence[Generation], most_waiting: int | None) -> None:
        """Begin siblings: all or none.

        Args:
            most_waiting: how many may wait for a slot; None is no limit.

        Raises:
            QueueFull: more would wait.
            ValueError: more would wait even in an empty queue.
        """
        if most_waiting is not None:
            places = self.slots + most_waiting
            if len(generations) > places:
                raise ValueError(
                    f"{len(generations)} answers were asked for, and only {places} requests may "
                    "run and wait; ask for fewer, or use a larger max_queue"
                )
            if self.left + len(generations) > places:
                raise QueueFull(f"{most_waiting} requests wait already; try again later")
        ids = range(self.added + 1, self.added + 1 + len(generations))
        self.added += len(generations)  # first: after an interrupt no id is given twice
        for id, generation in zip(ids, generations, strict=True):
            generation.begin(id, self.room, None if id == ids[0] else generations[0])
        self._requests.update({generation.id: generation for generation in generations})

    def sweep(self, release: Callable[[Generation], object]) -> None:
        """Call `release` for those that have ended, count them, and drop them."""
        ended = [generation for generation in self if generation.finish_reason is not None]
        if not ended:
            return
        for generation in ended:
            release(generation)
        past = self.past.plus(ended)
        left = {g.id: g for g in self if g not in ended}
        self.past, self._requests = past, left  # on one line: an interrupt sees both or none

    def metrics(self) -> EngineMetrics:
        """Of the past and of those that are left. Reads each finish_reason once."""
        requests = list(self)
        now = self.past.plus(requests)
        ended = sum(now.finished.values()) - sum(self.past.finished.values())
        running = min(self.slots, len(requests) - ended)
        return replace(now, running=running, waiting=len(requests) - ended - running)


def check_siblings(one: Request, other: Request) -> None:
    """Raise a ValueError unless the prompt of both can be computed and scored at once."""
    for name in ("prompt", "adapter", "score_from", "top_logprobs"):
        if getattr(one, name) != getattr(other, name):
            raise ValueError(f"siblings must have the same {name}; queue others by themselves")


def note_draws(generations: Sequence[Generation]) -> None:
    """Set `Generation.draws_globally`. All ranks call it at the same time."""
    found = [generation.request.draws_globally for generation in generations]
    if tensor_parallel.size() > 1:  # only the first rank's sampling counts, and all propose alike
        found = tensor_parallel.broadcast_json(found)
    for generation, value in zip(generations, found, strict=True):
        generation.draws_globally = value
