"""What a grammar must offer to the engine: which ids may come next. Knows no grammar itself."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


class GrammarState(Protocol):
    """How far one answer has followed its grammar."""

    def allowed(self) -> Tensor:
        """(n,) bool on the CPU: which ids may come next; ids from n on may not.

        Stop tokens are allowed only where the answer may end. Called once before each draw, and
        again after an interrupt: it must not depend on how often it is called.
        """
        ...

    def accept(self, token: int) -> None:
        """Go on by a generated id. Stop tokens are not passed on: nothing comes after them."""
        ...


@runtime_checkable
class Grammar(Protocol):
    """A compiled grammar. It never changes, and requests share it."""

    def start(self) -> GrammarState:
        """The state before the first id."""
        ...
