"""Bodies of requests, made at random from the OpenAPI document. Knows no server."""

from __future__ import annotations

import json
import random
import re
from typing import Any

TEXTS = (
    "", "Hello", "a b  c\n\n", "<|eot_id|><|im_end|>", "🙂🙃 ünï", "\x00\x7f\u2028", "\ud800",
    "{" * 50, "lorem ipsum " * 40, "null", "0",
    '{"a": 1}', "{}",
)  # fmt: skip
MATCHING = ("get_weather", "f", "7", "300", "000000000")  # for patterns of names and of ids
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, 1e308, 3.0, "", "x",
    "\ud800", [], {}, [[]], [None], [{}], {"": None}, {"type": "object"}, "required", [1, "a"],
    {"type": "image_url", "image_url": {"url": "data:,"}},
)  # fmt: skip


class Maker:
    """Makes values of JSON schemas, and alters them.

    Args:
        document: of OpenAPI, whose schemas may refer to one another.
    """

    def __init__(self, document: dict[str, Any], seed: int):
        self.schemas: dict[str, Any] = document["components"]["schemas"]
        self.random = random.Random(seed)

    def body(self, name: str, altered: bool) -> Any:
        """A body of the named schema. Altered, it mostly does not fit the schema."""
        body = self.value(self.schemas[name])
        for limit in ("max_tokens", "max_completion_tokens"):  # so that answers are short
            if limit in self.schemas[name]["properties"]:
                body[limit] = self.random.choice((1, 2, 3))
        if body.get("n") is not None:
            body["n"] = self.random.choice((1, 2, 3))
        if altered:
            for _ in range(self.random.choice((1, 1, 1, 2, 4))):
                body = self.alter(body)
        return body

    def value(self, schema: dict[str, Any], depth: int = 0) -> Any:
        """A value that fits a schema, of the keywords that our document uses."""
        pick = self.random.choice
        if "$ref" in schema:
            return self.value(self.schemas[schema["$ref"].rsplit("/", 1)[1]], depth)
        if "anyOf" in schema:  # the first is the usual one
            return self.value(pick([*schema["anyOf"], *schema["anyOf"][:1] * 3]), depth)
        if "enum" in schema:
            return pick(schema["enum"])
        kind = schema.get("type")
        if kind == "object":
            return self._object(schema, depth)
        if kind == "array":
            least = schema.get("minItems", 0)
            size = pick((least, least, least + 1, least + 2))
            return [self.value(schema["items"], depth + 1) for _ in range(size)]
        if kind == "string":
            return self._text(schema)
        if kind in ("integer", "number"):
            return self._number(schema)
        return {"boolean": pick((True, False)), "null": None}.get(kind or "", pick(ODD))

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        required = schema.get("required", ())
        found = {
            name: self.value(inner, depth + 1)
            for name, inner in schema.get("properties", {}).items()
            if name in required or self.random.random() < 0.15
        }
        more = schema.get("additionalProperties")
        if isinstance(more, dict):
            names = schema.get("propertyNames", {})
            found |= {self._text(names): self.value(more, depth + 1) for _ in range(2)}
        elif not schema.get("properties"):  # of any form: a schema, say
            found = self.random.choice(({}, {"type": "object"}, {"a": 1}))
        return found

    def _text(self, schema: dict[str, Any]) -> str:
        fits = [
            text
            for text in (*TEXTS, *MATCHING)
            if schema.get("minLength", 0) <= len(text) <= schema.get("maxLength", 10**6)
            and re.search(schema.get("pattern", ""), text)
        ]
        return self.random.choice(fits)

    def _number(self, schema: dict[str, Any]) -> float:
        low, high = schema.get("minimum", -10), schema.get("maximum", 10)
        if schema["type"] == "number":
            return self.random.choice((low, high, self.random.uniform(low, high)))
        near = min(high, low + 511)
        return self.random.choice((low, high, near, self.random.randint(low, near)))

    def alter(self, value: Any) -> Any:
        """The value with one place changed: replaced, left out, repeated, or nested."""
        pick = self.random.choice
        if isinstance(value, (dict, list)) and value and self.random.random() < 0.85:
            value = value.copy()
            key = pick(list(value)) if isinstance(value, dict) else pick(range(len(value)))
            if self.random.random() < 0.2:
                del value[key]
            else:
                value[key] = self.alter(value[key])
            return value
        deep: Any = "x"
        for _ in range(120):
            deep = [deep]
        return pick((*ODD, [value], [value, value], {"type": value}, str(value), deep))


def damage(body: bytes, source: random.Random) -> bytes:
    """Bytes that are no JSON, mostly."""
    at = source.randrange(len(body) + 1)
    return source.choice(
        (
            body[:at],
            body[:at] + bytes([source.randrange(256)]) + body[at:],
            body.replace(b"1", b"NaN"),
            b"\xef\xbb\xbf" + body,
            body + body,
            b"[" * 100_000,
        )
    )


def encoded(body: Any) -> bytes:
    return json.dumps(body).encode()
