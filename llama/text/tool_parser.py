"""Parser of the tool calls in a model's answer. Never runs or evaluates anything.

Errors of these functions are ValueErrors; `parse_tool_calls` returns them as `ToolReply.problem`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from llama.text.python_list import dict_of_unique, read_python_list
from llama.text.tool_prompt import BUILTIN_TOOLS, MAX_DEPTH, ToolCall, check_call

PYTHON_TAG = "<|python_tag|>"
MAX_LENGTH = 500_000  # characters; more than fit the context of any official model

_FUNCTION = "<function="
_FUNCTION_HEAD = re.compile(r"<function=([^<>\s]*)>\s*")
_FUNCTION_END = re.compile(r"\s*</function>|")
_BUILTIN_START = re.compile(rf"({'|'.join(BUILTIN_TOOLS)})\.call\s*\(")
_BUILTIN = re.compile(r'(\w+)\.call\s*\(\s*query\s*=\s*"((?:[^"\\]|\\.)*)"\s*\)', re.DOTALL)
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
    `[f(a=1), g(b="x")]` must be the whole text or all that follows `<|python_tag|>`. Any other
    text after the tag is code: a call of code_interpreter. `<function=name>{...}</function>` may
    be anywhere. One invalid call makes the whole text `content`, with a `problem`.

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
    if _BUILTIN_START.match(text):
        return _parse_builtin(text)
    calls = _parse_json(text, tagged) if text.startswith(("{", "[")) else None
    if calls is None and (head := _LIST_START.match(text)):
        is_call = _ARGUMENT_START.match(text, head.end())
        if not tagged:
            is_call = is_call or _OTHER_START.match(text, head.end())
        if is_call or (not tagged and text.endswith(")]")):
            calls = read_python_list(text)
    return calls


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


def _looks_like_call(value: object) -> bool:
    """Whether a JSON value is meant as a call, though perhaps an invalid one."""
    if isinstance(value, dict) and value.get("type") == "function":
        return True
    if not isinstance(value, dict) or "name" not in value:
        return False
    return "parameters" in value or "arguments" in value


def _call_of_json(value: object) -> ToolCall:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError('a call in JSON is {"name": ..., "parameters": {...}}, with a name')
    arguments = value.get("parameters", value.get("arguments"))
    if not isinstance(arguments, dict):
        raise ValueError(f'the "parameters" of {value["name"]:.80} must be a JSON object')
    return {"name": value["name"], "arguments": arguments}


def _parse_functions(text: str) -> tuple[str, list[ToolCall]]:
    """Calls such as `<function=name>{...}</function>`, and the text around them."""
    calls: list[ToolCall] = []
    content, position = "", 0
    while (start := text.find(_FUNCTION, position)) >= 0:
        content += text[position:start]
        head = _FUNCTION_HEAD.match(text, start)
        if not head:
            raise ValueError("a function call is <function=name>{...}</function>")
        try:
            arguments, position = _decode(text, head.end())
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
    """The JSON value at `start`, and its end. Checks the depth first: the decoder recurses."""
    depth = 0
    if text[start : start + 1] in ("[", "{"):
        for found in _BRACKETS.finditer(text, start):
            depth += (found[0] in "[{") - (found[0] in "]}")
            if depth > MAX_DEPTH + 2:  # 2 levels more: the call and a list of calls
                raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
            if depth == 0:
                break
    value, end = _DECODER.raw_decode(text, start)
    return value, end
