"""Fields of JSON bodies, each declared once: its type, range and meaning.

The checks, the OpenAPI document and the table in docs/server.md follow from the declarations.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

from llama.server.errors import ApiError, invalid, quoted

MAX_DEPTH = 100  # of lists and objects in a body
Record = TypeVar("Record")


class Kind(Protocol):
    """A type of JSON values."""

    def read(self, value: Any, param: str) -> Any:
        """The checked value, in Python's form. `param` is its path in the body.

        Raises:
            ApiError: it is of another type, or out of range.
        """

    def schema(self) -> dict[str, Any]:
        """Its JSON schema."""


@dataclass(frozen=True)
class Number:
    low: float
    high: float

    def read(self, value: Any, param: str) -> float:
        right = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not right or not self.low <= value <= self.high:  # NaN compares false
            raise invalid(
                param,
                f"{param} must be a number from {self.low:g} to {self.high:g}, not {quoted(value)}",
            )
        return float(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "number", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class Integer:
    low: int
    high: int

    def read(self, value: Any, param: str) -> int:
        right = isinstance(value, int) and not isinstance(value, bool)
        right = right or (isinstance(value, float) and value.is_integer())  # as in JSON schema
        if not right or not self.low <= value <= self.high:
            one = self.low == self.high
            span = self.low if one else f"an integer from {self.low} to {self.high}"
            raise invalid(param, f"{param} must be {span}, not {quoted(value)}")
        return int(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class Flag:
    def read(self, value: Any, param: str) -> bool:
        if not isinstance(value, bool):
            raise invalid(param, f"{param} must be true or false, not {quoted(value)}")
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Text:
    least: int = 0
    most: int | None = None

    def read(self, value: Any, param: str) -> str:
        if not isinstance(value, str):
            raise invalid(param, f"{param} must be text, not {quoted(value)}")
        if len(value) < self.least:
            raise invalid(param, f"{param} must not be empty")
        if self.most is not None and len(value) > self.most:
            raise invalid(
                param, f"{param} has {len(value)} characters; at most {self.most} are taken"
            )
        return value

    def schema(self) -> dict[str, Any]:
        limits = {"minLength": self.least or None, "maxLength": self.most}
        return {"type": "string"} | {k: v for k, v in limits.items() if v is not None}


@dataclass(frozen=True)
class Choice:
    values: tuple[str, ...]

    def read(self, value: Any, param: str) -> str:
        if not isinstance(value, str) or value not in self.values:
            known = ", ".join(map(json.dumps, self.values))
            raise invalid(param, f"{param} must be one of {known}, not {quoted(value)}")
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.values)}


@dataclass(frozen=True)
class Items:
    """A list, read as a tuple."""

    kind: Kind
    least: int = 0
    most: int | None = None

    def read(self, value: Any, param: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise invalid(param, f"{param} must be a list, not {quoted(value)}")
        if len(value) < self.least:
            raise invalid(param, f"{param} must have at least {self.least} items; leave it out")
        if self.most is not None and len(value) > self.most:
            raise invalid(param, f"{param} has {len(value)} items; at most {self.most} are taken")
        return tuple(self.kind.read(item, f"{param}[{i}]") for i, item in enumerate(value))

    def schema(self) -> dict[str, Any]:
        limits = {"minItems": self.least or None, "maxItems": self.most}
        found = {"type": "array", "items": self.kind.schema()}
        return found | {k: v for k, v in limits.items() if v is not None}


@dataclass(frozen=True)
class Nested:
    """An object whose fields a dataclass declares."""

    record: type

    def read(self, value: Any, param: str) -> Any:
        return read_record(self.record, value, param)

    def schema(self) -> dict[str, Any]:
        return record_schema(self.record)


@dataclass(frozen=True)
class Custom:
    """A value with a reader and a schema of its own."""

    reader: Callable[[Any, str], Any]
    described: Mapping[str, Any]

    def read(self, value: Any, param: str) -> Any:
        return self.reader(value, param)

    def schema(self) -> dict[str, Any]:
        return dict(self.described)


def wire(kind: Kind, help: str, default: Any = dataclasses.MISSING) -> Any:
    """A field of a body. Without a default the body must have it; null is the default."""
    return dataclasses.field(default=default, metadata={"kind": kind, "help": help})


def read_record(record: type[Record], data: object, param: str = "") -> Record:
    """A frozen dataclass from a JSON object. Keys that it does not declare are ignored.

    Raises:
        ApiError: a field is missing, of another type or out of range.
    """
    if not isinstance(data, dict):
        raise invalid(param, f"{param or 'the body'} must be a JSON object, not {quoted(data)}")
    values: dict[str, Any] = {}
    for field in dataclasses.fields(record):  # type: ignore[arg-type]
        path = f"{param}.{field.name}" if param else field.name
        value = data.get(field.name)
        if value is not None:
            values[field.name] = field.metadata["kind"].read(value, path)
        elif field.default is dataclasses.MISSING:
            raise invalid(path, f"{path} is missing")
    return record(**values)


def record_schema(record: type) -> dict[str, Any]:
    """The JSON schema of what `read_record` reads."""
    properties: dict[str, Any] = {}
    required = []
    for field in dataclasses.fields(record):
        schema = field.metadata["kind"].schema()
        if field.default is dataclasses.MISSING:
            required.append(field.name)
        else:
            schema = nullable(schema)
        properties[field.name] = schema | {"description": field.metadata["help"]}
    found: dict[str, Any] = {"type": "object", "properties": properties}
    return found | ({"required": required} if required else {})


def nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of the same values and null."""
    return {"anyOf": [schema, {"type": "null"}]}


def read_json(body: bytes) -> Any:
    """The JSON value of a request's body. Lone surrogates in it become U+FFFD.

    Raises:
        ApiError: it is not JSON (RFC 8259: without NaN), not UTF-8, or too deeply nested.
    """
    try:
        text = body.decode("utf-8")
        data = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError:
        raise invalid(None, "the body is not UTF-8; send JSON in UTF-8") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as e:
        raise invalid(None, f"the body is not JSON: {str(e)[:200]}") from None
    _check_depth(data)
    return _without_surrogates(data) if "\\ud" in text.lower() else data


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _too_deep() -> ApiError:
    return invalid(None, f"the body is nested more than {MAX_DEPTH} levels deep")


def _check_depth(data: object) -> None:
    """Without recursion: Python's own limit is in reach of what its JSON parser takes."""
    level = [data]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner += [v for v in value.values() if isinstance(v, (list, dict))]
            elif isinstance(value, list):
                inner += [v for v in value if isinstance(v, (list, dict))]
        if not inner:
            return
        level = inner
    raise _too_deep()


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_without_surrogates(k): _without_surrogates(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    return value
