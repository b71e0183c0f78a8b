"""Schemas that must be refused, {name: (schema, message)}, and schemas that are hard to follow."""

from __future__ import annotations

import json
from typing import Any

from llama.text.json_schema import MAX_SCHEMA_BYTES


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def all_of(levels: int, schema: dict[str, Any]) -> dict[str, Any]:
    for _ in range(levels):
        schema = {"allOf": [schema]}
    return schema


def chain(levels: int, link: dict[str, Any]) -> dict[str, Any]:
    """Definitions each of which refers to the next: `link` with REF replaced."""
    text = json.dumps(link)
    parts = {str(i): json.loads(text.replace("REF", f"#/$defs/{i + 1}")) for i in range(levels)}
    return {"$defs": parts | {str(levels): {"type": "null"}}, "$ref": "#/$defs/0"}


BAD: dict[str, tuple[Any, str]] = {
    "deep": (nested(100_000), "levels deep"),
    "large": ({"enum": ["x" * MAX_SCHEMA_BYTES]}, "use at most 65536"),
    "not JSON": ({"const": {1, 2}}, "is not JSON"),
    "NaN": ({"minimum": float("nan")}, "is not JSON"),
    "false": (False, "cannot be used"),
    "empty enum": ({"enum": []}, "cannot be used"),
    "unknown type": ({"type": "text"}, "Invalid type: text"),
    "wrong keyword": ({"type": "object", "required": "a"}, "required"),
    "format": ({"format": [], "type": 1}, "type must be"),
    "bounds": ({"type": "integer", "minimum": 2, "maximum": 1}, "minimum"),
    "unique items": ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    "lenient": ({"uniqueItems": True, "x-guidance": {"lenient": True}}, "uniqueItems"),
    "not": ({"not": {"type": "string"}}, "not"),
    "if": ({"if": {"type": "string"}, "then": {"minLength": 2}}, "if"),
    "one of": ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "use anyOf"),
    "keys may repeat": (
        {"type": "object", "additionalProperties": {}, "minProperties": 2},
        "minProperties",
    ),
    "remote": ({"$ref": "http://127.0.0.1:9/a.json"}, r"use \"#/\$defs/name\""),
    "file": ({"$ref": "file:///etc/passwd"}, r"use \"#/\$defs/name\""),
    "nowhere": ({"$ref": "#/$defs/none"}, "does not exist"),
    "itself": ({"$ref": "#"}, "leads to itself"),
    "circle": ({"allOf": [{"$ref": "#"}, {"type": "object"}]}, "circular"),
    "long chain": (chain(1500, {"$ref": "REF"}), "references lead"),
    "chain of allOf": (
        chain(90, all_of(12, {"$ref": "REF"})),
        "references lead",
    ),
    "lookahead": ({"type": "string", "pattern": "(?!a)b"}, "look-ahead"),
    "back reference": ({"type": "string", "pattern": r"(a)\1"}, "backreferences"),
    "parentheses": ({"type": "string", "pattern": "(" * 400 + ")" * 400}, "parentheses"),
    "many patterns": (
        {"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnopqrstuvwx"]},
        "over 6 patterns",
    ),
    "many patterns by reference": (
        chain(25, {"type": "string", "pattern": ".*a.*", "$ref": "REF"}),
        "over 6 patterns",
    ),
    "doubled patterns": (
        chain(50, {"allOf": [{"$ref": "REF"}, {"$ref": "REF", "pattern": "a"}]}),
        "over 6 patterns",
    ),
    "many alternatives": (
        {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(8)]} for i in range(12)
            ]
        },
        "too large",
    ),
    "bounds of 400 digits": ({"type": "integer", "minimum": 10**400}, "number out of range"),
}

HARD: dict[str, dict[str, Any]] = {
    "states": {"type": "string", "pattern": "^.*a.{200}$"},
    "repeats": {"type": "string", "pattern": "^(.*a){30}.{50}$"},
    "long": {"type": "string", "minLength": 10**9},
    "many": {"type": "array", "items": nested(20), "minItems": 10**9},
    "endless": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "references": chain(700, {"properties": {"a": {"$ref": "REF"}}}),
    "optional references": chain(
        600, {"oneOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "REF"}}]}
    ),
}
