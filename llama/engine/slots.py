"""Which ids each row of the KV cache holds, and for whom. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llama.engine.request import Request
from llama.model import Transformer

# A copy of fewer cached positions from one row to another costs more than it saves.
WORTH_COPYING = 16


@dataclass(eq=False)
class Slot:
    """One row of the cache.

    Attributes:
        cached: the ids whose keys and values it holds, from position 0 on. They outlive their
            request, for the next one that begins alike.
        written: positions from here on are zero.
        used: when it was last given to a request, in requests.
        stale: nothing that comes later may build upon `cached`.
    """

    request: Request | None = None
    cached: list[int] = field(default_factory=list)
    written: int = 0
    used: int = 0
    stale: bool = False

    @property
    def running(self) -> Request:
        """The request of a slot that is not free."""
        assert self.request is not None
        return self.request

    @property
    def pending(self) -> int:
        """How many ids of its request are not cached yet."""
        return len(self.running.tokens) - len(self.cached)

    def release(self) -> None:
        """Free it. What a failed request computed is not built upon."""
        if self.stale or (self.request is not None and self.request.error is not None):
            self.cached = []
        self.request = None


class Slots:
    """The rows of a model's cache, in order: those that decode, those that prefill, free ones.

    A model reads neighbouring rows, so slots change places as requests come and go.
    """

    def __init__(self, model: Transformer):
        self.model = model
        rows, self.room = next(model.caches()).k.shape[:2]
        # Whoever had the cache before may have left anything in it.
        self.rows = [Slot(written=self.room) for _ in range(rows)]
        self.uses = 0

    def free(self) -> list[Slot]:
        """Slots without a request, those that hold nothing first, then the longest unused."""
        free = [slot for slot in self.rows if slot.request is None]
        return sorted(free, key=lambda slot: (bool(slot.cached), slot.used))

    def place(self, request: Request) -> None:
        """Give a free slot to a request, with as much of its prompt cached as any slot holds."""
        tokens, free = request.tokens, self.free()
        kept, source = 0, free[0]
        if request.reuse and request.score_from is None:
            for slot in (slot for slot in self.rows if not slot.stale):
                n = min(common_prefix(slot.cached, tokens), len(tokens) - 1)
                if n > kept and (n >= WORTH_COPYING or slot.request is None):
                    kept, source = n, slot
        target = free[0]
        if source.request is None and 2 * kept >= len(source.cached):
            target = source  # most of what it holds goes on being used
        target.cached = []  # should an interrupt come, or memory run out
        if target is not source:
            kept = kept if kept >= WORTH_COPYING else 0
            for cache in self.model.caches():
                cache.copy_row(self.rows.index(source), self.rows.index(target), kept)
        row = self.rows.index(target)
        # Rows of different lengths read up to each other's position: nothing there may be NaN.
        for cache in self.model.caches():
            cache.clear(row, kept, target.written)
        self.uses += 1
        target.cached, target.written, target.stale = tokens[:kept], kept, False
        target.request, target.used = request, self.uses
        request.reused = kept

    def arrange(self) -> tuple[list[Slot], list[Slot]]:
        """Bring the slots into order; (those that decode, those that prefill)."""

        def rank(slot: Slot) -> int:
            if slot.request is None:
                return 2
            return 0 if len(slot.request.tokens) > len(slot.request.prompt) else 1

        for i in range(len(self.rows)):
            j = min(range(i, len(self.rows)), key=lambda j: rank(self.rows[j]))
            if rank(self.rows[j]) < rank(self.rows[i]):
                self._swap(i, j)
        ranks = [rank(slot) for slot in self.rows]
        decoding, working = ranks.count(0), len(ranks) - ranks.count(2)
        return self.rows[:decoding], self.rows[decoding:working]

    def _swap(self, i: int, j: int) -> None:
        a, b = self.rows[i], self.rows[j]
        for cache in self.model.caches():
            cache.swap_rows(i, j, max(a.written, b.written))
        self.rows[i], self.rows[j] = b, a


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
