"""Checks of JSON schemas before they are compiled. Knows nothing about tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

MAX_SCHEMA_BYTES = 65_536  # as JSON
MAX_SCHEMA_DEPTH = 64

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
    try:
        prepared: dict[str, Any] = _prepared(json.loads(text))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    return prepared


def _depths(value: object) -> Iterator[int]:
    """How deep each list and object of a value is. Not recursive."""
    waiting = [(1, value)]
    while waiting:
        depth, value = waiting.pop()
        inner = value.values() if isinstance(value, Mapping) else value
        if isinstance(inner, (list, tuple)) or isinstance(value, Mapping):
            yield depth
            waiting += [(depth + 1, item) for item in inner]  # type: ignore[union-attr]
            if depth > MAX_SCHEMA_DEPTH:
                return


def _prepared(schema: Any) -> Any:
    """A schema, and those in it, checked and without unknown formats."""
    if not isinstance(schema, dict):
        return schema
    prepared = {}
    for key, value in schema.items():
        if key in _NAMED and isinstance(value, dict):
            value = {name: _prepared(inner) for name, inner in value.items()}
        elif key in _NESTED:
            value = list(map(_prepared, value)) if isinstance(value, list) else _prepared(value)
        elif key == "format" and value not in FORMATS:
            continue
        prepared[key] = value
    reference = prepared.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise ValueError(f"$ref {reference[:80]!r} leads out of the schema; put it under $defs")
    least, required = prepared.get("minProperties"), prepared.get("required")
    listed = len(required) if isinstance(required, list) else 0
    if isinstance(least, (int, float)) and least > max(1, listed):
        raise ValueError(f"minProperties {least}: list as many under required; keys may repeat")
    return prepared
