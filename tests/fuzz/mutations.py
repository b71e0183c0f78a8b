"""Hypothesis strategies: damage of JSON and of bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

DEEP = "@deep@"
# Values that broke readers, of every JSON type.
HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31 - 1, 2**31, 2**62, 2**63, 2**64, 10**400, 0.0, -1.5,
    1e308,
    float("nan"), float("inf"), "", "x", "\x00", "\ud800", "x" * 100_000, "1", [], [[]], {}, [None],
    [1] * 1000, {"x": 1}, {"": {}}, DEEP,
]  # fmt: skip
Path = tuple[str | int, ...]


class Damaged(bytes):
    """Bytes that show what was done to them."""

    edits: list[Any]

    def __repr__(self) -> str:
        return f"Damaged({self.edits!r:.2000})"

    @classmethod
    def by(cls, edits: list[Any], content: bytes) -> Damaged:
        damaged = cls(content)
        damaged.edits = edits
        return damaged


def places(value: Any, path: Path = ()) -> list[Path]:
    """Places in a JSON value; of long lists and objects the first, the middle and the last item."""
    found = [path]
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    if len(keys) > 40:
        keys = [keys[0], keys[len(keys) // 2], keys[-1]]
    for key in keys:
        found += places(value[key], (*path, key))
    return found


def change(value: Any, path: Path, new: Callable[[Any], Any] | None) -> Any:
    """A copy with the item at `path` replaced by `new(item)`; None: removed."""
    if not path:
        return new(value) if new else {}
    value = copy.deepcopy(value)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    if new:
        parent[path[-1]] = new(parent[path[-1]])
    else:
        del parent[path[-1]]
    return value


@st.composite
def damaged_json(draw: st.DrawFn, good: Any) -> Damaged:
    """Text of JSON with one to three items replaced, removed, wrapped or doubled."""
    value = good
    edits: list[Any] = []
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        item = draw(st.sampled_from(HOSTILE) | st.integers() | st.floats() | st.text(max_size=20))
        how = draw(st.sampled_from(["replace"] * 5 + ["remove", "wrap", "double"]))
        new: dict[str, Callable[[Any], Any] | None] = {
            "replace": lambda old, item=item: item,  # type: ignore[misc]
            "remove": None,
            "wrap": lambda old: [old],
            "double": lambda old: old * 2 if isinstance(old, (str, list)) else {"x": old},
        }
        value = change(value, path, new[how])
        edits.append((path, how, item if how == "replace" else None))
    text = json.dumps(value).replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000)
    return Damaged.by(edits, text.encode())


@st.composite
def damaged_bytes(draw: st.DrawFn, good: bytes) -> Damaged:
    """Bytes with one to four parts overwritten, removed or doubled; often near the start."""
    data = bytearray(good)
    edits: list[Any] = []
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        last = len(data) - 1
        start = draw(st.integers(0, min(last, 2000)) | st.integers(0, last))
        length = draw(st.sampled_from([1, 2, 4, 8, 32]))
        how = draw(st.sampled_from(["number", "number", "random", "remove", "double", "cut"]))
        if how == "number":
            number = draw(st.sampled_from([0, 1, -1, 2**31 - 1, 2**31, 2**62, 2**63, -(2**16)]))
            edits.append((start, number))
            data[start : start + 8] = (number % 2**64).to_bytes(8, "little")
        elif how == "random":
            data[start : start + length] = draw(st.binary(min_size=length, max_size=length))
            edits.append((start, bytes(data[start : start + length])))
        elif how == "remove":
            del data[start : start + length]
            edits.append((start, how, length))
        elif how == "double":
            data[start:start] = data[start : start + length]
            edits.append((start, how, length))
        else:
            del data[start:]
            edits.append((start, how))
    return Damaged.by(edits, bytes(data))
