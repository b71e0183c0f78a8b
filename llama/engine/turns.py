"""Which thread steps: one at a time, and the others get the results of its steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llama.distributed import tensor_parallel
from llama.engine.forks import watch_forks


class Turns:
    """A lock for short changes, and the turn to make a step, which takes longer.

    Attributes:
        changed: the lock; notified when a step has ended, and by whoever changes something that
            others wait for.
    """

    def __init__(self) -> None:
        watch_forks()
        self.changed = threading.Condition(threading.RLock())
        self._stepper = 0  # the thread whose turn it is
        self._only = 0  # the only thread allowed, with several ranks

    @property
    def stepping(self) -> bool:
        """Whether some thread is making a step."""
        return self._stepper != 0

    @contextmanager
    def take(self, ready: Callable[[], object], finish: Callable[[], object]) -> Iterator[bool]:
        """Become the stepping thread; False if another thread's step already satisfied `ready`.

        Args:
            finish: called with the lock when the turn ends.

        Raises:
            RuntimeError: several threads with several ranks.
        """
        me = threading.get_ident()
        if tensor_parallel.size() > 1 and self._only not in (0, me):
            raise RuntimeError("with several ranks, one thread makes all calls, on every rank")
        mine = False
        try:
            with self.changed:
                self._only = me
                # If an interrupt ended a step of this thread, `_stepper` may still name it.
                self.changed.wait_for(lambda: ready() or self._stepper in (0, me))
                if not ready():
                    mine, self._stepper = True, me
            yield mine
        finally:
            if self._stepper == me:
                with self.changed:
                    self._stepper = 0
                    self.changed.notify_all()
                    finish()
