"""Which ids each row of the KV cache holds, and for whom. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic

from llama.engine.guesses import Guesses
from llama.engine.request import Generation
from llama.model import KVCache

# Copying fewer cached positions from one row to another costs more than it saves.
WORTH_COPYING = 16


@dataclass(eq=False)
class Slot:
    """One row of the cache.

    Attributes:
        cached: the ids whose keys and values the row holds, from position 0 on. They stay after
            their request has ended, for the next one with the same beginning.
        written: positions from here on are zero.
        used: number of the last request placed here; the smallest is the least recently used.
        stale: no later request may build upon `cached`.
        group: of the last request placed here: its siblings may always build upon `cached`.
        adapter: of the last request placed here, with which `cached` was computed.
        guesses: about ids proposed to its request; None before the first time.
    """

    generation: Generation | None = None
    cached: list[int] = field(default_factory=list)
    written: int = 0
    used: int = 0
    stale: bool = False
    group: int = 0
    adapter: str | None = None
    guesses: Guesses | None = None

    @property
    def running(self) -> Generation:
        """The generation of a slot that is not free."""
        assert self.generation is not None
        return self.generation

    @property
    def pending(self) -> int:
        """How many ids of its generation are not cached yet."""
        return len(self.running.tokens) - len(self.cached)

    def release(self) -> None:
        """Free the slot. Nobody builds upon what a failed request computed."""
        if self.stale or (self.generation is not None and self.generation.finish_reason == "error"):
            self.cached = []
        self.generation, self.guesses = None, None


class Slots:
    """The rows of a cache, in this order: decoding, prefilling, free.

    A model reads neighbouring rows, so slots change places as requests come and go.

    Args:
        cache: of each layer; see `Transformer.new_cache`. `place` clears what will be read.
    """

    def __init__(self, cache: Sequence[KVCache]):
        self.cache = cache
        n, self.room = cache[0].k.shape[:2]
        self.rows = [Slot(written=self.room) for _ in range(n)]
        self.uses = 0

    def free(self) -> list[Slot]:
        """Slots without a request: first those with nothing cached, then the longest unused."""
        free = [slot for slot in self.rows if slot.generation is None]
        return sorted(free, key=lambda slot: (bool(slot.cached), slot.used))

    def release(self, generation: Generation) -> None:
        """Free the slot of a generation, if it has one."""
        for slot in self.rows:
            if slot.generation is generation:
                slot.release()

    def prefilling(self, group: int) -> bool:
        """Whether the prompt of these siblings is being computed."""
        return any(
            slot.group == group
            and slot.generation is not None
            and slot.generation.finish_reason is None
            and len(slot.cached) < len(slot.generation.request.prompt)
            for slot in self.rows
        )

    def sources(self, generation: Generation) -> list[Slot]:
        """Slots upon whose cached ids a generation may build."""
        request = generation.request
        return [
            slot
            for slot in self.rows
            if not slot.stale
            and slot.adapter == request.adapter
            and (request.reuse or slot.group == generation.group)
        ]

    @staticmethod
    def reusable(generation: Generation) -> int:
        """Most ids of the prompt that need not be computed: the last one predicts the next id."""
        request = generation.request
        if request.score_from is None or generation.take_scores():
            return len(generation.tokens) - 1
        return min(max(request.score_from, 1), len(generation.tokens)) - 1  # predicts a scored id

    def place(self, generation: Generation) -> None:
        """Give a free slot to a generation, with as much of its prompt as any slot has cached."""
        tokens, free = generation.tokens, self.free()
        kept, source, most = 0, free[0], self.reusable(generation)
        for slot in self.sources(generation):
            n = min(common_prefix(slot.cached, tokens), most)
            if n > kept and (n >= WORTH_COPYING or slot.generation is None):
                kept, source = n, slot
        target = free[0]
        if source.generation is None and 2 * kept >= len(source.cached):
            target = source  # most of its cached ids stay in use
        target.cached = []  # in case an interrupt comes, or memory runs out
        target.adapter = generation.request.adapter
        if target is not source:
            kept = kept if kept >= WORTH_COPYING else 0
            for cache in self.cache:
                cache.copy_row(self.rows.index(source), self.rows.index(target), kept)
        row = self.rows.index(target)
        # Rows of different lengths read up to each other's position: nothing there may be NaN.
        for cache in self.cache:
            cache.clear(row, kept, target.written)
        self.uses += 1
        target.cached, target.written, target.stale = tokens[:kept], kept, False
        target.group, target.used = generation.group, self.uses
        generation.reused, generation.placed_at = kept, monotonic()
        target.generation = generation

    def arrange(self) -> tuple[list[Slot], list[Slot]]:
        """Bring the slots into order; (decoding slots, prefilling slots)."""

        def order(slot: Slot) -> int:
            if slot.generation is None:
                return 2
            return 0 if len(slot.generation.tokens) > len(slot.generation.request.prompt) else 1

        orders = [order(slot) for slot in self.rows]
        if orders != sorted(orders):  # in most steps nothing changes places
            for i in range(len(self.rows)):
                j = min(range(i, len(self.rows)), key=lambda j: order(self.rows[j]))
                if order(self.rows[j]) < order(self.rows[i]):
                    self._swap(i, j)
            orders.sort()
        decoding, working = orders.count(0), len(orders) - orders.count(2)
        return self.rows[:decoding], self.rows[decoding:working]

    def _swap(self, i: int, j: int) -> None:
        a, b = self.rows[i], self.rows[j]
        for cache in self.cache:
            cache.swap_rows(i, j, max(a.written, b.written))
        self.rows[i], self.rows[j] = b, a


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
