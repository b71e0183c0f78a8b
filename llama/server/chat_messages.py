"""Messages and tools in OpenAI's form -> ours. Knows nothing about prompts."""

from __future__ import annotations

import json
from typing import Any, cast

from llama.server.chat_schemas import MAX_MESSAGES, MAX_TOOLS
from llama.server.errors import invalid, quoted
from llama.server.fields import MAX_DEPTH, Flag, Text
from llama.text.messages import Message
from llama.text.tool_prompt import ToolCall, check_call, check_tools

ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_KEYS = {"text": "text", "refusal": "refusal"}  # type of a part: its key


def read_messages(value: Any, param: str) -> tuple[Message, ...]:
    """A dialog. Results of tools come in the order of the calls, as prompts have no ids.

    Raises:
        ApiError: a message is invalid; `param` is its path.
    """
    if not isinstance(value, list):
        raise invalid(param, f"{param} must be a list of messages, not {quoted(value)}")
    if not value:
        raise invalid(param, f"{param} is an empty list; give at least one message")
    if len(value) > MAX_MESSAGES:
        raise invalid(param, f"{param} has {len(value)} messages; at most {MAX_MESSAGES} are taken")
    dialog: list[Message] = []
    order: dict[str, int] = {}  # id of a call of the last assistant's message: its index
    results: dict[int, Message] = {}
    for i, item in enumerate(value):
        path = f"{param}[{i}]"
        message = _read_message(item, path)
        if message["role"] == "tool":
            at = _result_index(item, f"{path}.tool_call_id", order)
            if at in results:
                raise invalid(f"{path}.tool_call_id", "this tool call has a result already")
            results[at] = message
            continue
        dialog += [results[at] for at in sorted(results)]
        dialog.append(message)
        order, results = _call_order(item, path), {}
    return tuple(dialog + [results[at] for at in sorted(results)])


def _call_order(item: dict[str, Any], path: str) -> dict[str, int]:
    """The ids of a message's calls, and their places."""
    calls = item.get("tool_calls") if item["role"] == "assistant" else None
    order = {call["id"]: k for k, call in enumerate(calls or ())}
    if len(order) < len(calls or ()):
        raise invalid(f"{path}.tool_calls", f"{path}.tool_calls has an id twice")
    return order


def _result_index(item: dict[str, Any], param: str, order: dict[str, int]) -> int:
    call = item.get("tool_call_id")
    if not isinstance(call, str):
        raise invalid(param, f"{param} must be the id of a tool call, not {quoted(call)}")
    if call not in order:
        raise invalid(
            param,
            f"{param}: the assistant's message before it has no tool call with the id "
            f"{quoted(call)}",
        )
    return order[call]


def _read_message(item: Any, path: str) -> Message:
    if not isinstance(item, dict):
        raise invalid(path, f"{path} must be an object with role and content, not {quoted(item)}")
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(
            f"{path}.role",
            f"{path}.role must be one of {', '.join(map(json.dumps, ROLES))}, not {quoted(role)}",
        )
    if item.get("function_call") is not None:
        raise invalid(
            f"{path}.function_call", f"{path}.function_call is not supported; use tool_calls"
        )
    if item.get("audio") is not None:
        raise invalid(f"{path}.audio", f"{path}.audio is not supported: the model takes text only")
    calls = item.get("tool_calls")
    if calls and role != "assistant":
        raise invalid(f"{path}.tool_calls", "only an assistant's message has tool_calls")
    read_calls = _read_calls(calls, f"{path}.tool_calls") if calls is not None else []
    content = item.get("content")
    if content is None and role == "assistant" and (read_calls or item.get("refusal")):
        content = item.get("refusal") or ""
    message = {"role": "system" if role == "developer" else role}
    message["content"] = _read_content(content, f"{path}.content")
    if read_calls:
        return cast(Message, {**message, "tool_calls": read_calls})
    return cast(Message, message)


def _read_content(content: Any, param: str) -> str:
    """A text, or parts, which are joined by line feeds."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(param, f"{param} must be text or a list of text parts, not {quoted(content)}")
    if len(content) > MAX_MESSAGES:
        raise invalid(param, f"{param} has more than {MAX_MESSAGES} parts")
    texts = []
    for j, part in enumerate(content):
        path = f"{param}[{j}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise invalid(path, f'{path} must be {{"type": "text", "text": ...}}')
        if kind not in _TEXT_KEYS:
            raise invalid(
                f"{path}.type", f"{path} is of type {quoted(kind)}; the model takes text only"
            )
        key = _TEXT_KEYS[kind]
        texts.append(Text().read(part.get(key), f"{path}.{key}"))
    return "\n".join(texts)


def _read_calls(calls: Any, param: str) -> list[ToolCall]:
    if not isinstance(calls, list):
        raise invalid(param, f"{param} must be a list, not {quoted(calls)}")
    if len(calls) > MAX_TOOLS:
        raise invalid(param, f"{param} has {len(calls)} calls; at most {MAX_TOOLS} are taken")
    return [_read_call(call, f"{param}[{k}]") for k, call in enumerate(calls)]


def _read_call(call: Any, path: str) -> ToolCall:
    function = _read_function(call, path)
    if not isinstance(call.get("id"), str):
        raise invalid(f"{path}.id", f"{path}.id must be text, not {quoted(call.get('id'))}")
    where = f"{path}.function.arguments"
    text = function.get("arguments")
    if not isinstance(text, str):
        raise invalid(where, f"{where} must be the text of a JSON object, not {quoted(text)}")
    try:
        arguments = json.loads(text) if text.strip() else {}
        read: ToolCall = {"name": function["name"], "arguments": arguments}
        check_call(read)
    except RecursionError:
        raise invalid(where, f"{where} is nested more than {MAX_DEPTH} levels deep") from None
    except (ValueError, TypeError) as e:
        raise invalid(where, f"{where}: {e}") from None
    return read


def _read_function(value: Any, path: str) -> dict[str, Any]:
    """`function` of {"type": "function", "function": {"name": ...}}."""
    if not isinstance(value, dict):
        raise invalid(path, f"{path} must be an object, not {quoted(value)}")
    if value.get("type", "function") != "function":
        raise invalid(
            f"{path}.type", f'{path}.type must be "function", not {quoted(value["type"])}'
        )
    function = value.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise invalid(f"{path}.function", f"{path}.function must be an object with a name")
    return function


def read_tools(value: Any, param: str) -> tuple[dict[str, Any], ...]:
    """Definitions with name, description and parameters.

    Raises:
        ApiError: a definition is invalid, or there is none.
    """
    if not isinstance(value, list):
        raise invalid(param, f"{param} must be a list of tools, not {quoted(value)}")
    if not value:
        raise invalid(param, f"{param} is an empty list; define a tool, or leave it out")
    if len(value) > MAX_TOOLS:
        raise invalid(param, f"{param} has {len(value)} tools; at most {MAX_TOOLS} are taken")
    tools = []
    for k, item in enumerate(value):
        path = f"{param}[{k}].function"
        function = _read_function(item, f"{param}[{k}]")
        tools.append(_definition(function, path))
        try:
            check_tools(tools[-1:], "json")
        except (ValueError, TypeError) as e:
            raise invalid(path, f"{path}: {e}") from None
    try:
        check_tools(tools, "json")
    except ValueError as e:  # two of one name
        raise invalid(param, f"{param}: {e}") from None
    return tuple(tools)


def _definition(function: dict[str, Any], path: str) -> dict[str, Any]:
    """A definition with the three keys that prompts have. `strict` has no meaning here."""
    description = function.get("description")
    parameters = function.get("parameters")
    if not isinstance(parameters, (dict, type(None))):
        where = f"{path}.parameters"
        raise invalid(
            where, f"{where} must be a JSON schema of an object, not {quoted(parameters)}"
        )
    if function.get("strict") is not None:
        Flag().read(function["strict"], f"{path}.strict")
    return {
        "name": function["name"],
        "description": Text().read(description or "", f"{path}.description"),
        "parameters": {"type": "object", "properties": {}} | (parameters or {}),
    }


def read_tool_choice(value: Any, param: str) -> str:
    """ "none", "auto", "required", or the name of a tool after "function:"."""
    if isinstance(value, str) and value in ("none", "auto", "required"):
        return value
    if isinstance(value, dict):
        return f"function:{_read_function(value, param)['name']}"
    raise invalid(
        param,
        f'{param} must be "none", "auto", "required" or '
        f'{{"type": "function", "function": {{"name": ...}}}}, not {quoted(value)}',
    )
