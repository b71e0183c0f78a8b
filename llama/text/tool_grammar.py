"""Grammars of tool calls: text that `parse_tool_calls` reads back as valid calls."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llama.text.grammar import Grammar, Vocabulary, compiled, grammar_vocabulary
from llama.text.json_schema import MAX_SCHEMA_BYTES, checked_schema
from llama.text.tool_prompt import Tool, ToolForm, check_tools, is_identifier

MAX_CALLS = 16  # in one answer
# Keys of a tool's parameters whose meaning a Python call keeps: each argument has its own schema.
_PYTHON_KEYS = {
    "$defs", "$schema", "additionalProperties", "definitions", "description", "properties",
    "required", "title", "type",
}  # fmt: skip


def tool_call_grammar(
    tokenizer: Vocabulary,
    tools: Sequence[Tool],
    rows: int,
    *,
    form: ToolForm = "json",
    names: Collection[str] | None = None,
    parallel: bool = True,
) -> Grammar:
    """The text of a call of one of the tools, and of up to 16 calls if `parallel`.

    Arguments follow the tools' schemas, and are those that `properties` lists unless
    `additionalProperties` says more. The forms are those of `encode_tool_calls`: where a schema
    cannot be written as a Python call, python_list has JSON.

    Args:
        tools: definitions; Meta's built-in tools cannot be forced.
        rows: the model's vocab_size.
        names: the tools that may be called; None is all.

    Raises:
        TypeError, ValueError: a tool is invalid, or its schema is not supported.
        ImportError: llguidance is not installed.
    """
    builtin, functions = check_tools(tools, form)
    if builtin and names is None:
        raise ValueError(f"{builtin} cannot be forced: define a tool of your own for it")
    functions = [f for f in functions if names is None or f["name"] in names]
    if not functions or (names is not None and len(functions) < len(set(names))):
        raise ValueError(f"no tool to call: names are {names}; define each of them in tools")
    if len(json.dumps(functions)) > MAX_SCHEMA_BYTES:
        raise ValueError(f"the tools have over {MAX_SCHEMA_BYTES} bytes of JSON; offer fewer")
    parameters = {f["name"]: _parameters(f) for f in functions}
    if form == "python_list" and not all(map(_fits_python, parameters.values())):
        form = "json"
    rules = _Rules(parallel)
    calls = {
        "json": rules.json_call,
        "function_tag": rules.function_tag,
        "python_list": rules.python_call,
    }
    for name, schema in parameters.items():
        calls[form](name, schema)
    vocabulary = grammar_vocabulary(tokenizer, rows)
    return compiled(vocabulary, rules.lark(form), rules.schemas, "the tools' parameters")


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a tool's arguments: an object, without properties that it does not list."""
    schema = checked_schema(function["parameters"], f"the parameters of {function['name']}")
    if hidden := [name for name in schema.get("properties", {}) if name.startswith("__")]:
        raise ValueError(f"{hidden[0]!r:.80} is not the name of an argument; rename it")
    return {"additionalProperties": False} | schema | {"type": "object"}


def _fits_python(schema: Mapping[str, Any]) -> bool:
    """Whether arguments can be written `name=value`, each with a schema of its own."""
    if not schema.keys() <= _PYTHON_KEYS or schema["additionalProperties"] is not False:
        return False
    properties = schema.get("properties", {})
    text = json.dumps(properties)  # references to elsewhere lose their place
    elsewhere = text.count('"$ref": "#') - text.count('"#/$defs/') - text.count('"#/definitions/')
    return all(map(is_identifier, properties)) and elsewhere <= 0


class _Rules:
    """Lark rules of calls, and the JSON schemas that they name."""

    def __init__(self, parallel: bool):
        self.parallel = parallel
        self.schemas: dict[str, dict[str, Any]] = {}
        self._calls: list[str] = []
        self._rules: list[str] = []

    def lark(self, form: ToolForm) -> str:
        """All rules; the first is `start`."""
        separator = {"json": '"; "', "function_tag": '""', "python_list": '", "'}[form]
        start = f"call ({separator} call){{0,{MAX_CALLS - 1}}}" if self.parallel else "call"
        if form == "python_list":
            start = f'"[" {start} "]"'
        return "\n".join([f"start: {start}", f"call: {' | '.join(self._calls)}", *self._rules])

    def json_call(self, name: str, schema: dict[str, Any]) -> None:
        before = f'{{"type": "function", "name": {json.dumps(name)}, "parameters": '
        self._call(f'{json.dumps(before)} {self._schema(schema)} "}}"')

    def function_tag(self, name: str, schema: dict[str, Any]) -> None:
        self._call(f'"<function={name}>" {self._schema(schema)} "</function>"')

    def python_call(self, name: str, schema: dict[str, Any]) -> None:
        """Arguments in order; optional ones may be left out, so commas depend on what came."""
        shared = {key: value for key, value in schema.items() if key in ("$defs", "definitions")}
        required = schema.get("required", [])
        rule = f"args{len(self._calls)}"
        first, later = f"{rule}_first", f"{rule}_later"
        properties = schema.get("properties", {})
        for i, (key, value) in enumerate(properties.items()):
            value = value if isinstance(value, dict) else {} if value else {"enum": []}
            text = f'"{key}=" {self._schema(shared | value)} {later}{i + 1}'
            skip = "" if key in required else f" | {{}}{i + 1}"
            self._rules.append(f"{first}{i}: {text}{skip.format(first)}")
            self._rules.append(f'{later}{i}: ", " {text}{skip.format(later)}')
        self._rules += [f'{first}{len(properties)}: ""', f'{later}{len(properties)}: ""']
        self._call(f'"{name}(" {first}0 ")"')

    def _call(self, text: str) -> None:
        self._rules.append(f"call{len(self._calls)}: {text}")
        self._calls.append(f"call{len(self._calls)}")

    def _schema(self, schema: dict[str, Any]) -> str:
        name = f"schema{len(self.schemas)}"
        self.schemas[name] = schema
        return f"@{name}"
