"""Counts the work of a Jinja template. Knows no template.

Costs are counted, not timed, so that every rank and every run gives the same result.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Mapping
from typing import Any

import jinja2

BUDGET, PER_INPUT = 5_000_000, 100  # most work: a constant, and more for each character of input
OPERATION = 20  # what a step costs beside the size of its values
MAX_VALUE = 1_000_000  # characters of one value, beside 4 times the input; an 8th as many items
MAX_DEPTH = 64  # of nested lists and dicts


class TooMuchError(Exception):
    """A template does more work than any honest one."""


class Namespace(jinja2.utils.Namespace):
    """Jinja's namespace. It cannot be put into a list, a dict or a namespace, and so not grow."""

    def __setitem__(self, name: str, value: Any) -> None:
        measure(value)
        if isinstance(value, Namespace):
            raise TooMuchError("it puts a namespace into another value")
        super().__setitem__(name, value)


def measure(value: Any, most: int = 10**9) -> tuple[int, int, int]:
    """(items, characters, depth) of a value, nested ones counted as often as they occur."""
    items = characters = 0
    level = [value]
    for depth in range(MAX_DEPTH):
        inner: list[Any] = []
        for v in level:
            if isinstance(v, str):
                characters += len(v)
            elif isinstance(v, int):
                characters += v.bit_length() // 3
            elif isinstance(v, Mapping):
                inner += [*v, *v.values()]
            elif isinstance(v, Collection) and not isinstance(v, range):
                inner += v
            elif isinstance(v, Namespace) and depth:
                raise TooMuchError("it puts a namespace into another value")
            if len(inner) > most // 8:
                break
        items += len(level)
        if characters > most or items + len(inner) > most // 8:
            raise TooMuchError("it makes a value that is too large")
        if not inner:
            return items, characters, depth
        level = inner
    raise TooMuchError("it nests lists too deeply")


class Meter(threading.local):
    """What a render may still do. Each thread has its own."""

    left = 0
    largest = 0

    def start(self, given: int) -> None:
        """Begin a render with an input of `given` characters and items."""
        self.left = BUDGET + PER_INPUT * given
        self.largest = MAX_VALUE + 4 * given

    def spend(self, cost: int = 0) -> bool:
        self.left -= OPERATION + cost
        if self.left < 0:
            raise TooMuchError("it does too much work")
        return True

    def check(self, size: int) -> None:
        """Check the size of a value before it is made."""
        if size > self.largest:
            raise TooMuchError("it makes a value that is too large")

    def charge(self, value: Any) -> Any:
        """Pay for a new value; returns it."""
        items, characters, _ = measure(value, self.largest)
        self.spend(characters if isinstance(value, str) else items)
        return value

    def read(self, value: Any) -> Any:
        """Pay for a value that is read with all it contains; returns it."""
        items, characters, _ = measure(value, self.largest)
        self.spend(items + characters)
        return value

    def replace(self, s: Any, old: Any, new: Any, count: int | None = None) -> str:
        """The filter `replace`."""
        s, old, new = str(self.read(s)), str(self.read(old)), str(self.read(new))
        self.check(len(s) + s.count(old) * len(new))
        return str(s.replace(old, new, -1 if count is None else count))

    def join(self, values: Any, between: Any = "") -> str:
        """The filter `join`."""
        values, between = self.read(list(values)), str(self.read(between))
        self.check(len(values) * len(between))
        return str(between.join(map(str, values)))

    def indent(self, s: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
        """The filter `indent`."""
        s = str(self.read(s))
        self.check((len(s.splitlines()) + 1) * (width if isinstance(width, int) else len(width)))
        return str(jinja2.filters.do_indent(s, width, first, blank))

    def format(self, text: str, *args: Any, **kwargs: Any) -> None:
        """Check a call of `str.format`."""
        items, characters, _ = measure([args, kwargs], self.largest)
        if re.search(r"\d{4}|:[^}]*\{", text):
            raise TooMuchError("it formats with a width that may be large")
        self.check(len(text) + text.count("{") * (items + characters))
