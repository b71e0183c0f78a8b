"""Parser of the tool calls in a model's answer. Never runs or evaluates anything.

Errors of these functions are ValueErrors; `parse_tool_calls` returns them as `ToolReply.problem`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from llama.text.python_list import dict_of_unique, read_python_list, read_python_value
from llama.text.tool_prompt import BUILTIN_TOOLS, MAX_DEPTH, ToolCall, check_call

PYTHON_TAG = "<|python_tag|>"
MESSAGE_KEYS = {"role", "content", "tool_calls"}
MAX_LENGTH = 500_000  # characters; more than fit the context of any official model

_FUNCTION = "<function="
_FUNCTION_HEAD = re.compile(r"<function=([^<>\s]*)>\s*")
_FUNCTION_END = re.compile(r"\s*</function>|")
_BUILTIN_START = re.compile(rf"({'|'.join(BUILTIN_TOOLS)})\.call\s*\(")
_BUILTIN = re.compile(r'(\w+)\.call\s*\(\s*query\s*=\s*"((?:[^"\\]|\\.)*)"\s*\)', re.DOTALL)
_FENCE = re.compile(r"```[\w+-]*")
_NEXT_FENCE = re.compile(r"\n```\s*```[\w+-]*")
_SEPARATORS = re.compile(r"(?:[\s;,]|<\|python_tag\|>)*")
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)
_OBJECT_START = re.compile(r'\[?\s*\{\s*"')
_LIST_START = re.compile(r"\[\s*[A-Za-z_][\w.]*\s*\(\s*")
_ARGUMENT_START = re.compile(r"\w+\s*=(?!=)|\)")
_OTHER_START = re.compile(r"[\"'*]|\w+\s*\(")


@dataclass(frozen=True)
class ToolReply:
    """A parsed answer.

    Attributes:
        content: the text outside of the calls; the whole text if there are no calls.
        tool_calls: the calls in order, not checked against the tools that were offered.
        problem: what is wrong with text that looks like a call, or None. If it is set, there are
            no `tool_calls`.
    """

    content: str
    tool_calls: list[ToolCall] = field(default_factory=list)
    problem: str | None = None


def parse_tool_calls(message: Mapping[str, Any] | str) -> ToolReply:
    """Parse the tool calls of a model's answer, in any form that Llama 3.1 and later use.

    JSON `{"name": ..., "parameters": {...}}`, `brave_search.call(query="...")` and Python
    `[f(a=1), g(b="x")]` must be the whole text or all that follows `<|python_tag|>`, also in
    fenced blocks (```). JSON may have OpenAI's nested form, and arguments as a string of JSON. Any
    other text after the tag is code: a call of code_interpreter. `<function=name>{...}</function>`
    may be anywhere. One invalid call makes the whole text `content`, with a `problem`.

    Args:
        message: a message, or the text of one.

    Raises:
        TypeError: `message` is neither. No text raises an error.
    """
    text = message["content"] if isinstance(message, Mapping) else message
    if not isinstance(text, str):
        raise TypeError(f"give a message or its text, not {type(text).__name__}")
    if len(text) > MAX_LENGTH:
        return ToolReply(text, problem=f"not parsed: over {MAX_LENGTH} characters")
    try:
        content, calls = _parse(text)
        for call in calls:
            check_call(call)
    except ValueError as error:
        return ToolReply(text, problem=str(error))
    return ToolReply(content, calls) if calls else ToolReply(text)


def _parse(text: str) -> tuple[str, list[ToolCall]]:
    """The content and the calls of an answer."""
    inside = _unfenced(text.strip())
    if inside != text.strip() and inside.startswith((PYTHON_TAG, _FUNCTION)):
        text = inside
    calls = _parse_whole(text.strip(), tagged=False)
    if calls is not None:
        return "", calls
    before, tag, after = text.partition(PYTHON_TAG)
    if _FUNCTION in before or (not tag and _FUNCTION in text):
        return _parse_functions(text)
    if not tag:
        return text, []
    stripped = after.strip()
    if _SEPARATORS.fullmatch(after):
        raise ValueError(f"nothing follows {PYTHON_TAG}")
    if stripped.startswith(_FUNCTION):
        content, calls = _parse_functions(stripped)
        return (before + content).strip(), calls
    calls = _parse_whole(stripped, tagged=True)
    code: ToolCall = {"name": "code_interpreter", "arguments": {"code": after}}
    return before.strip(), [code] if calls is None else calls


def _parse_whole(text: str, tagged: bool) -> list[ToolCall] | None:
    """The calls that make up the whole text; None if it does not look like calls.

    Args:
        tagged: whether `text` follows `<|python_tag|>`, and so may be code.
    """
    whole, text = text, _unfenced(text)
    may_be_code = tagged or text != whole
    if _BUILTIN_START.match(text):
        return _parse_builtin(text)
    calls = _parse_json(text, tagged) if text.startswith(("{", "[")) else None
    if calls is None and (head := _LIST_START.match(text)):
        is_call = _ARGUMENT_START.match(text, head.end())
        if not may_be_code:
            is_call = is_call or _OTHER_START.match(text, head.end())
        if is_call or (not may_be_code and text.endswith(")]")):
            calls = read_python_list(text)
    return calls


def _unfenced(text: str) -> str:
    """The inside of fenced blocks that are the whole text; a last fence may be missing."""
    start = _FENCE.match(text)
    if not start:
        return text
    inside = _NEXT_FENCE.sub("", text[start.end() :]).removesuffix("```")
    return text if "\n```" in inside else inside.strip()  # otherwise text follows a block


def _parse_sequence(text: str, parse_one: Callable[[int], int]) -> None:
    """Call `parse_one(start) -> end` until the end of the text; separators are skipped."""
    position = 0
    while position < len(text):
        position = parse_one(position)
        position = _SEPARATORS.match(text, position).end()  # type: ignore[union-attr]  # matches ""


def _parse_builtin(text: str) -> list[ToolCall]:
    """Calls such as `brave_search.call(query="...")`."""
    calls: list[ToolCall] = []

    def parse_one(start: int) -> int:
        found = _BUILTIN.match(text, start)
        if not found or found[1] not in BUILTIN_TOOLS:
            raise ValueError('a built-in call is name.call(query="..."), with nothing after it')
        # A backslash escapes a quote, or a backslash before a quote; elsewhere it is literal.
        query = re.sub(r'(?<!\\)(\\+)("|\Z)', lambda m: m[1][: len(m[1]) // 2] + m[2], found[2])
        calls.append({"name": found[1], "arguments": {"query": query}})
        return found.end()

    _parse_sequence(text, parse_one)
    return calls


def _parse_json(text: str, tagged: bool) -> list[ToolCall] | None:
    """Calls as JSON objects or lists of them; None if the text does not look like calls."""
    values: list[Any] = []

    def parse_one(start: int) -> int:
        value, end = _decode(text, start)
        if isinstance(value, dict) and value.keys() <= MESSAGE_KEYS and not value.get("content"):
            value = value.get("tool_calls", value)  # OpenAI's message of calls alone
        values.extend(value if isinstance(value, list) else [value])
        return end

    problem = None
    try:
        _parse_sequence(text, parse_one)
    except ValueError as error:
        problem = error
    is_call = any(map(_looks_like_call, values)) or (tagged and bool(_OBJECT_START.match(text)))
    if problem and not values:
        is_call = is_call or bool(_OBJECT_START.match(text) and '"name"' in text)
    if not is_call:
        return None
    if problem:
        raise ValueError(f"broken JSON: {problem}")
    return [_call_of_json(value) for value in values]


def _function_of(value: dict[str, Any]) -> dict[str, Any]:
    """The object with name and arguments; OpenAI's form nests it in "function"."""
    function = value.get("function")
    if isinstance(function, dict):
        return function
    if isinstance(function, str) and value.get("type") == "function":
        return {"name": function} | value
    return value


def _looks_like_call(value: object) -> bool:
    """Whether a JSON value is meant as a call, though perhaps an invalid one."""
    if not isinstance(value, dict):
        return False
    function = _function_of(value)
    has_arguments = "parameters" in function or "arguments" in function
    return value.get("type") == "function" or ("name" in function and has_arguments)


def _call_of_json(value: object) -> ToolCall:
    function = _function_of(value) if isinstance(value, dict) else {}
    name = function.get("name")
    if not isinstance(name, str):
        raise ValueError('a call in JSON is {"name": ..., "parameters": {...}}, with a name')
    given = [function[key] for key in ("parameters", "arguments") if key in function]
    no_arguments: Any = {} if given else None
    arguments = next((v for v in given if v not in (None, "null")), no_arguments)
    if isinstance(arguments, dict) and _is_definition(function, nested=function is not value):
        raise ValueError(f"a definition of {name:.80}, not a call with a name and arguments")
    problem = ""
    if isinstance(arguments, str):
        try:
            arguments = _decode_all(arguments.strip() or "{}")
        except ValueError as error:
            problem = f" ({error})"
    if not isinstance(arguments, dict):
        raise ValueError(f'the "parameters" of {name:.80} must be a JSON object{problem}')
    return {"name": name, "arguments": arguments}


def _is_definition(function: dict[str, Any], nested: bool) -> bool:
    """Whether `function` repeats a tool's definition: its "parameters" are a JSON schema."""
    schema = function.get("parameters")
    if not isinstance(schema, dict):
        return False
    if not schema:
        return "description" in function
    is_schema = schema.get("type") in ("object", "dict") and "properties" in schema
    return is_schema and (nested or "description" in function)


def _parse_functions(text: str) -> tuple[str, list[ToolCall]]:
    """Calls such as `<function=name>{...}</function>`, and the text around them."""
    calls: list[ToolCall] = []
    content, position = "", 0
    while (start := text.find(_FUNCTION, position)) >= 0:
        content += text[position:start]
        head = _FUNCTION_HEAD.match(text, start)
        if not head:
            raise ValueError("a function call is <function=name>{...}</function>")
        arguments: Any = {}
        position = head.end()
        if not text.startswith("</function>", position):
            try:
                arguments, position = _decode(text, position)
            except ValueError as error:
                raise ValueError(f"broken JSON after {head[0]:.80}: {error}") from None
        calls.append(_call_of_json({"name": head[1], "parameters": arguments}))
        end = _FUNCTION_END.match(text, position)
        position = end.end()  # type: ignore[union-attr]  # matches ""
    return (content + text[position:]).strip(), calls


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=dict_of_unique, parse_constant=_refuse_constant, strict=False
)  # strict=False: models write raw line breaks in strings


def _decode(text: str, start: int) -> tuple[Any, int]:
    """The JSON value at `start`, or the same as Python writes it, and its end.

    Checks the depth first: the decoder recurses.
    """
    depth = 0
    if text[start : start + 1] in ("[", "{"):
        for found in _BRACKETS.finditer(text, start):
            depth += (found[0] in "[{") - (found[0] in "]}")
            if depth > MAX_DEPTH + 2:  # 2 levels more: the call and a list of calls
                raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
            if depth == 0:
                break
    try:
        value, end = _DECODER.raw_decode(text, start)
    except ValueError as error:
        try:
            return read_python_value(text, start)
        except ValueError:
            raise error from None
    return value, end


def _decode_all(text: str) -> Any:
    """The JSON value that `text` is."""
    value, end = _decode(text, 0)
    if end < len(text):
        raise ValueError(f"text follows it: {text[end:]:.20}")
    return value
