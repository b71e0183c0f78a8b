"""Seeded random JSON schemas whose instances are short, so that an answer of random tokens ends."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

Schema = dict[str, Any]

PATTERNS = ["^[a-z]{2,4}$", "^x(foo|bar)?[0-9]{1,2}$", r"^\d{3}-\d{4}$", "^(é|ü|日本){1,3}$"]
FORMATS = ["date", "ipv4", "uuid", "time"]
WORDS = ["red", 'a"b', "back\\slash", "tab\t", "日本", "😀", "", "</function>", "<|eot_id|>"]
NAMES = ["a", "name", "x_y", "kind", "größe", "two words", 'q"', "type"]


def random_schema(random: Random, depth: int = 3) -> Schema:
    """A schema of any type, nested at most `depth` levels."""
    makers: list[Callable[[Random, int], Schema]] = [_string, _integer, _number, _enum, _simple]
    if depth > 0:
        makers += [_array, _object, _object, _any_of, _map, _all_of]
    return random.choice(makers)(random, depth)


def random_object(random: Random, depth: int = 3) -> Schema:
    """A schema of an object, some with a definition that is used twice."""
    schema = _object(random, depth)
    if random.random() < 0.3:
        schema["$defs"] = {"part": random_schema(random, 1)}
        for name in ("left", "right"):
            schema["properties"][name] = {"$ref": "#/$defs/part"}
        schema["required"].append("left")
    return schema


def _string(random: Random, depth: int) -> Schema:
    kind = random.choice(["length", "pattern", "format"])
    if kind == "pattern":
        return {"type": "string", "pattern": random.choice(PATTERNS)}
    if kind == "format":
        return {"type": "string", "format": random.choice(FORMATS)}
    least = random.randrange(4)
    return {"type": "string", "minLength": least, "maxLength": least + random.randrange(6)}


def _integer(random: Random, depth: int) -> Schema:
    low = random.randrange(-1000, 1000)
    schema: Schema = {"type": "integer", "minimum": low, "maximum": low + random.randrange(500)}
    if random.random() < 0.3:
        schema = {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 9}
    elif random.random() < 0.3:
        schema |= {"multipleOf": 5, "maximum": low + 100}
    return schema


def _number(random: Random, depth: int) -> Schema:
    low = random.randrange(-50, 50) / 4
    return {"type": "number", "minimum": low, "maximum": low + random.choice([0.25, 3, 100])}


def _enum(random: Random, depth: int) -> Schema:
    values = [*WORDS, 0, -1.5, True, None, [1, "x"], {"a": [None]}, 10**12]
    if random.random() < 0.3:
        return {"const": random.choice(values)}
    return {"enum": random.sample(values, random.randrange(1, 6))}


def _simple(random: Random, depth: int) -> Schema:
    return random.choice([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}])


def _array(random: Random, depth: int) -> Schema:
    least = random.randrange(3)
    schema: Schema = {"type": "array", "items": random_schema(random, depth - 1)}
    schema |= {"minItems": least, "maxItems": least + random.randrange(3)}
    if random.random() < 0.3:
        prefix = [random_schema(random, depth - 1) for _ in range(random.randrange(1, 3))]
        schema = {"type": "array", "prefixItems": prefix, "items": False}
        schema["minItems"] = random.randrange(len(prefix) + 1)
    return schema


def _object(random: Random, depth: int) -> Schema:
    names = random.sample(NAMES, random.randrange(5))
    properties = {name: random_schema(random, depth - 1) for name in names}
    required = [name for name in names if random.random() < 0.6]
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _map(random: Random, depth: int) -> Schema:
    """An object of keys that a pattern allows."""
    inner = random_schema(random, depth - 1)
    schema: Schema = {"type": "object", "patternProperties": {"^k[0-9]$": inner}}
    return schema | {"maxProperties": random.randrange(1, 3), "additionalProperties": False}


def _any_of(random: Random, depth: int) -> Schema:
    return {"anyOf": [random_schema(random, depth - 1) for _ in range(random.randrange(1, 4))]}


def _all_of(random: Random, depth: int) -> Schema:
    low = random.randrange(100)
    return {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + 20}]}
