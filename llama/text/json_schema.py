"""Checks of JSON schemas before they are compiled. Knows nothing about tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

MAX_SCHEMA_BYTES = 65_536  # as JSON
MAX_SCHEMA_DEPTH = 64
MAX_PATTERNS = 6  # that one text must match; the time to compile doubles with each
MAX_REFERENCES = 100  # that lead from one to the next

# Formats that text is made to have. Others are annotations, as the standard says.
FORMATS = (
    "date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid",
)  # fmt: skip
_NAMED = {"properties", "patternProperties", "$defs", "definitions"}  # hold {name: schema}
_NESTED = {
    "items", "additionalItems", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf",
}  # fmt: skip


def checked_schema(schema: Mapping[str, Any] | bool, what: str) -> dict[str, Any]:
    """A copy of a schema without unknown formats. What else is not supported, llguidance refuses.

    Args:
        what: the name of the schema in messages.

    Raises:
        TypeError, ValueError: it is no schema, too large, or has what no grammar can ensure.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    if not isinstance(schema, Mapping):
        raise TypeError(f"{what} must be a JSON object or a bool, not {type(schema).__name__}")
    if any(depth > MAX_SCHEMA_DEPTH for depth in _depths(schema)):
        raise ValueError(
            f"{what} is nested more than {MAX_SCHEMA_DEPTH} levels deep; use $defs and $ref"
        )
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from None
    if len(text) > MAX_SCHEMA_BYTES:
        raise ValueError(f"{what} has {len(text)} bytes of JSON; use at most {MAX_SCHEMA_BYTES}")
    copy = json.loads(text)
    try:
        prepared: dict[str, Any] = _prepared(copy, _Patterns(copy))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    except RecursionError:
        raise ValueError(f"{what}: references lead too deep; use fewer") from None
    return prepared


def _depths(value: object) -> Iterator[int]:
    """How deep each list and object of a value is. Not recursive."""
    waiting: list[tuple[int, Any]] = [(1, value)]
    while waiting:
        depth, value = waiting.pop()
        inner = list(value.values()) if isinstance(value, Mapping) else value
        if isinstance(inner, (list, tuple)):
            yield depth
            waiting += [(depth + 1, item) for item in inner]


def _prepared(schema: Any, patterns: _Patterns) -> Any:
    """A schema, and those in it, checked; without unknown formats and names of schemas."""
    if not isinstance(schema, dict):
        return schema
    prepared = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            value = {name: _prepared(inner, patterns) for name, inner in value.items()}
        elif key in _NESTED:
            many = isinstance(value, list)
            inner = [_prepared(item, patterns) for item in (value if many else [value])]
            value = inner if many else inner[0]
        elif (key == "format" and value not in FORMATS) or key in ("$id", "id"):
            continue
        prepared[key] = value
    if patterns.count(schema) > MAX_PATTERNS:
        raise ValueError(f"over {MAX_PATTERNS} patterns for one text; write them as one pattern")
    least, required = prepared.get("minProperties"), prepared.get("required")
    listed = len(required) if isinstance(required, list) else 0
    if isinstance(least, (int, float)) and least > max(1, listed):
        raise ValueError(f"minProperties {least}: list as many under required; keys may repeat")
    return prepared


class _Patterns:
    """Counts the patterns and formats that apply to one text, also through references."""

    def __init__(self, root: dict[str, Any]):
        self._root = root
        self._known: dict[str, int] = {}  # of the schema that a reference leads to

    def count(self, schema: Any, references: int = 0) -> int:
        if not isinstance(schema, dict):
            return 0
        count = ("pattern" in schema) + ("format" in schema)
        for key, together in (("allOf", sum), ("anyOf", max), ("oneOf", max)):
            if isinstance(schemas := schema.get(key), list) and schemas:
                count += together([self.count(item, references) for item in schemas])
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return count
        if references > MAX_REFERENCES:
            raise ValueError(f"over {MAX_REFERENCES} references lead from one to the next")
        if reference not in self._known:
            self._known[reference] = 0  # in a circle
            self._known[reference] = self.count(self._at(reference), references + 1)
        return count + self._known[reference]

    def _at(self, reference: str) -> Any:
        """What a reference such as "#/$defs/name" leads to; None if there is nothing."""
        if reference != "#" and not reference.startswith("#/"):
            raise ValueError(f'$ref {reference[:80]!r} is not supported; use "#/$defs/name"')
        place: Any = self._root
        for part in unquote(reference).split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
                place = place[int(part)]
            else:
                place = place.get(part) if isinstance(place, dict) else None
        return place
