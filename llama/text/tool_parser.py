"""A model's answer -> the tool calls in it. Reads text as data; runs and evaluates nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from llama.text.python_list import read_python_list, unique
from llama.text.tool_prompt import BUILTIN_TOOLS, MAX_DEPTH, ToolCall, check_call

PYTHON_TAG = "<|python_tag|>"
MAX_LENGTH = 500_000  # characters; more than any official model's context holds

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
    """What an answer holds.

    Attributes:
        content: the text outside of calls; the whole text where there is none, or a problem.
        tool_calls: in order. None is checked against the tools that you offered.
        problem: why something that looks like a call is none, or None.
    """

    content: str
    tool_calls: list[ToolCall] = field(default_factory=list)
    problem: str | None = None


def parse_tool_calls(message: Mapping[str, Any] | str) -> ToolReply:
    """The calls in a model's answer, in any of the forms that Llama 3.1 and later write.

    Calls of JSON `{"name": ..., "parameters": {...}}`, `brave_search.call(query="...")` and
    Python `[f(a=1), g(b="x")]` fill the text, or what follows `<|python_tag|>`; any other text
    after the tag is code, a call of code_interpreter. `<function=name>{...}</function>` may stand
    anywhere. Either all calls are good, or the text comes back with the `problem`.

    Args:
        message: a message with `content`, or its text.

    Raises:
        TypeError: it is neither. No text raises anything.
    """
    text = message["content"] if isinstance(message, Mapping) else message
    if not isinstance(text, str):
        raise TypeError(f"give a message or its text, not {type(text).__name__}")
    if len(text) > MAX_LENGTH:
        return ToolReply(text, problem=f"not read: over {MAX_LENGTH} characters")
    try:
        content, calls = _read(text)
        for call in calls:
            check_call(call)
    except ValueError as error:
        return ToolReply(text, problem=str(error))
    return ToolReply(content, calls) if calls else ToolReply(text)


def _read(text: str) -> tuple[str, list[ToolCall]]:
    """The content and the calls; raises ValueError for broken ones."""
    whole = _read_whole(text.strip(), tagged=False)
    if whole is not None:
        return "", whole
    lead, tag, rest = text.partition(PYTHON_TAG)
    if _FUNCTION in lead or (not tag and _FUNCTION in text):
        return _read_functions(text)
    if not tag:
        return text, []
    after = rest.strip()
    if _SEPARATORS.fullmatch(rest):
        raise ValueError(f"nothing follows {PYTHON_TAG}")
    if after.startswith(_FUNCTION):
        content, calls = _read_functions(after)
        return (lead + content).strip(), calls
    found = _read_whole(after, tagged=True)
    code: ToolCall = {"name": "code_interpreter", "arguments": {"code": rest}}
    return lead.strip(), [code] if found is None else found


def _read_whole(text: str, tagged: bool) -> list[ToolCall] | None:
    """The calls that fill a text; None where it does not try to be one."""
    if _BUILTIN_START.match(text):
        return _read_builtin(text)
    calls = _read_json(text, tagged) if text.startswith(("{", "[")) else None
    if calls is None and (head := _LIST_START.match(text)):
        tries = _ARGUMENT_START.match(text, head.end())
        if not tagged:  # with the tag it may well be code
            tries = tries or _OTHER_START.match(text, head.end())
        if tries or (not tagged and text.endswith(")]")):
            calls = read_python_list(text)
    return calls


def _read_all(text: str, read: Callable[[int], int]) -> None:
    """Call `read(start) -> end` for one thing after the other, until the text ends."""
    at = 0
    while at < len(text):
        at = read(at)
        at = _SEPARATORS.match(text, at).end()  # type: ignore[union-attr]  # matches ""


def _read_builtin(text: str) -> list[ToolCall]:
    calls: list[ToolCall] = []

    def read(start: int) -> int:
        found = _BUILTIN.match(text, start)
        if not found or found[1] not in BUILTIN_TOOLS:
            raise ValueError('a built-in call is name.call(query="..."), with nothing after it')
        # Backslashes escape a quote, and each other before one; else they are themselves.
        query = re.sub(r'(?<!\\)(\\+)("|\Z)', lambda m: m[1][: len(m[1]) // 2] + m[2], found[2])
        calls.append({"name": found[1], "arguments": {"query": query}})
        return found.end()

    _read_all(text, read)
    return calls


# JSON


def _read_json(text: str, tagged: bool) -> list[ToolCall] | None:
    values: list[Any] = []

    def read(start: int) -> int:
        value, end = _decode(text, start)
        values.extend(value if isinstance(value, list) else [value])
        return end

    broken = None
    try:
        _read_all(text, read)
    except ValueError as error:
        broken = error
    tries = any(map(_is_attempt, values)) or (tagged and bool(_OBJECT_START.match(text)))
    if broken and not values:
        tries = tries or bool(_OBJECT_START.match(text) and '"name"' in text)
    if not tries:
        return None
    if broken:
        raise ValueError(f"broken JSON: {broken}")
    return [_from_json(value) for value in values]


def _is_attempt(value: object) -> bool:
    if isinstance(value, dict) and value.get("type") == "function":
        return True
    if not isinstance(value, dict) or "name" not in value:
        return False  # data
    return "parameters" in value or "arguments" in value


def _from_json(value: object) -> ToolCall:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError('a call in JSON is {"name": ..., "parameters": {...}}, with a name')
    arguments = value.get("parameters", value.get("arguments"))
    if not isinstance(arguments, dict):
        raise ValueError(f'the "parameters" of {value["name"]:.80} must be a JSON object')
    return {"name": value["name"], "arguments": arguments}


def _read_functions(text: str) -> tuple[str, list[ToolCall]]:
    calls: list[ToolCall] = []
    content, at = "", 0
    while (start := text.find(_FUNCTION, at)) >= 0:
        content += text[at:start]
        head = _FUNCTION_HEAD.match(text, start)
        if not head:
            raise ValueError("a function call is <function=name>{...}</function>")
        try:
            arguments, at = _decode(text, head.end())
        except ValueError as error:
            raise ValueError(f"broken JSON after {head[0]:.80}: {error}") from None
        calls.append(_from_json({"name": head[1], "parameters": arguments}))
        at = _FUNCTION_END.match(text, at).end()  # type: ignore[union-attr]  # matches ""
    return (content + text[at:]).strip(), calls


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=unique, parse_constant=_no_constant, strict=False
)  # not strict: models write line ends in strings


def _decode(text: str, start: int) -> tuple[Any, int]:
    """The JSON value at `start` and its end. Its depth is counted before the decoder recurses."""
    depth = 0
    if text[start : start + 1] in ("[", "{"):
        for found in _BRACKETS.finditer(text, start):
            depth += (found[0] in "[{") - (found[0] in "]}")
            if depth > MAX_DEPTH + 2:  # the call and a list around it
                raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
            if depth == 0:
                break
    value, end = _DECODER.raw_decode(text, start)
    return value, end
