"""Messages and tools in OpenAI's form -> ours. Knows nothing about prompts, HTTP or files."""

from __future__ import annotations

import json
from typing import Any, cast

from llama.common.printable import quoted
from llama.text.messages import Message
from llama.text.tool_prompt import MAX_DEPTH, ToolCall, check_call, check_tools

ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_MESSAGES = 2048
MAX_TOOLS = 128
_TEXT_KEYS = {"text": "text", "refusal": "refusal"}  # type of a part: its key


class FieldError(ValueError):
    """A field that is wrong.

    Attributes:
        path: where it is, such as "messages[0].content". The message names it too.
    """

    def __init__(self, path: str, message: str):
        super().__init__(message)
        self.path = path


class MessageReader:
    """Reads dialogs and definitions of tools.

    Args:
        lenient: also take what files of training data have: the role "ipython", `stop_reason`,
            calls and results without ids, calls without `function` around them, arguments that
            are objects, definitions with other keys.
    """

    def __init__(self, lenient: bool = False):
        self.lenient = lenient
        self.roles = (*ROLES, "ipython") if lenient else ROLES

    def messages(self, value: Any, path: str) -> tuple[Message, ...]:
        """A dialog. Results of tools come in the order of the calls, as prompts have no ids.

        Raises:
            FieldError: a message is invalid.
        """
        if not isinstance(value, list):
            raise FieldError(path, f"{path} must be a list of messages, not {quoted(value)}")
        if not value:
            raise FieldError(path, f"{path} is an empty list; give at least one message")
        if len(value) > MAX_MESSAGES:
            raise FieldError(
                path, f"{path} has {len(value)} messages; at most {MAX_MESSAGES} are taken"
            )
        dialog: list[Message] = []
        order: dict[str, int] = {}  # id of a call of the last assistant's message: its index
        results: dict[int, Message] = {}
        for i, item in enumerate(value):
            message = self._message(item, f"{path}[{i}]")
            if message["role"] in ("tool", "ipython"):
                at = self._result_index(item, f"{path}[{i}].tool_call_id", order, len(results))
                if at in results:
                    raise FieldError(
                        f"{path}[{i}].tool_call_id", "this tool call has a result already"
                    )
                results[at] = message
                continue
            dialog += [results[at] for at in sorted(results)]
            dialog.append(message)
            order, results = self._call_order(item, f"{path}[{i}]"), {}
        return tuple(dialog + [results[at] for at in sorted(results)])

    def _call_order(self, item: dict[str, Any], path: str) -> dict[str, int]:
        """The ids of a message's calls, and their places."""
        calls = (item.get("tool_calls") if item["role"] == "assistant" else None) or ()
        ids = [call.get("id") for call in calls]
        order = {id: k for k, id in enumerate(ids) if isinstance(id, str)}
        if len(order) < sum(isinstance(id, str) for id in ids):
            raise FieldError(f"{path}.tool_calls", f"{path}.tool_calls has an id twice")
        return order

    def _result_index(
        self, item: dict[str, Any], path: str, order: dict[str, int], before: int
    ) -> int:
        """The index of the call that a result is of; `before` results precede it."""
        call = item.get("tool_call_id")
        if self.lenient and (call is None or not order):
            return before
        if not isinstance(call, str):
            raise FieldError(path, f"{path} must be the id of a tool call, not {quoted(call)}")
        if call not in order:
            raise FieldError(
                path,
                f"{path}: the assistant's message before it has no tool call with the id "
                f"{quoted(call)}",
            )
        return order[call]

    def _message(self, item: Any, path: str) -> Message:
        if not isinstance(item, dict):
            raise FieldError(
                path, f"{path} must be an object with role and content, not {quoted(item)}"
            )
        role = item.get("role")
        if not isinstance(role, str) or role not in self.roles:
            raise FieldError(
                f"{path}.role",
                f"{path}.role must be one of {', '.join(map(json.dumps, self.roles))}, "
                f"not {quoted(role)}",
            )
        if item.get("function_call") is not None:
            raise FieldError(
                f"{path}.function_call", f"{path}.function_call is not supported; use tool_calls"
            )
        if item.get("audio") is not None:
            raise FieldError(
                f"{path}.audio", f"{path}.audio is not supported: the model takes text only"
            )
        calls = item.get("tool_calls")
        if calls and role != "assistant":
            raise FieldError(f"{path}.tool_calls", "only an assistant's message has tool_calls")
        read_calls = self._calls(calls, f"{path}.tool_calls") if calls is not None else []
        content = item.get("content")
        if content is None and role == "assistant" and (read_calls or item.get("refusal")):
            content = item.get("refusal") or ""
        message = {"role": "system" if role == "developer" else role}
        message["content"] = _content(content, f"{path}.content")
        more: dict[str, Any] = {"tool_calls": read_calls} if read_calls else {}
        if self.lenient and item.get("stop_reason") is not None:
            more["stop_reason"] = item["stop_reason"]
        return cast(Message, {**message, **more})

    def _calls(self, calls: Any, path: str) -> list[ToolCall]:
        if not isinstance(calls, list):
            raise FieldError(path, f"{path} must be a list, not {quoted(calls)}")
        if len(calls) > MAX_TOOLS:
            raise FieldError(path, f"{path} has {len(calls)} calls; at most {MAX_TOOLS} are taken")
        return [self._call(call, f"{path}[{k}]") for k, call in enumerate(calls)]

    def _call(self, call: Any, path: str) -> ToolCall:
        function = self._function(call, path)
        if not isinstance(call.get("id"), str) and not self.lenient:
            raise FieldError(f"{path}.id", f"{path}.id must be text, not {quoted(call.get('id'))}")
        where = f"{path}.{'function.' if function is not call else ''}arguments"
        given: Any = function.get("arguments")
        is_object = self.lenient and isinstance(given, dict)
        if not isinstance(given, str) and not is_object:
            raise FieldError(
                where, f"{where} must be the text of a JSON object, not {quoted(given)}"
            )
        try:
            arguments = (json.loads(given) if given.strip() else {}) if not is_object else given
            read: ToolCall = {"name": function["name"], "arguments": arguments}
            check_call(read)
        except RecursionError:
            raise FieldError(
                where, f"{where} is nested more than {MAX_DEPTH} levels deep"
            ) from None
        except (ValueError, TypeError) as e:
            raise FieldError(where, f"{where}: {e}") from None
        return read

    def _function(self, value: Any, path: str) -> dict[str, Any]:
        if self.lenient and isinstance(value, dict) and isinstance(value.get("name"), str):
            return value
        return read_function(value, path)

    def tools(self, value: Any, path: str) -> tuple[dict[str, Any], ...]:
        """Definitions with name, description and parameters.

        Raises:
            FieldError: a definition is invalid, or there is none.
        """
        if not isinstance(value, list):
            raise FieldError(path, f"{path} must be a list of tools, not {quoted(value)}")
        if not value:
            raise FieldError(path, f"{path} is an empty list; define a tool, or leave it out")
        if len(value) > MAX_TOOLS:
            raise FieldError(path, f"{path} has {len(value)} tools; at most {MAX_TOOLS} are taken")
        tools = []
        for k, item in enumerate(value):
            where = f"{path}[{k}].function"
            tools.append(_definition(self._function(item, f"{path}[{k}]"), where))
            try:
                check_tools(tools[-1:], "json")
            except (ValueError, TypeError) as e:
                raise FieldError(where, f"{where}: {e}") from None
        try:
            check_tools(tools, "json")
        except ValueError as e:  # two of one name
            raise FieldError(path, f"{path}: {e}") from None
        return tuple(tools)


def _content(content: Any, path: str) -> str:
    """A text, or parts, which are joined by line feeds."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise FieldError(
            path, f"{path} must be text or a list of text parts, not {quoted(content)}"
        )
    if len(content) > MAX_MESSAGES:
        raise FieldError(path, f"{path} has more than {MAX_MESSAGES} parts")
    texts = []
    for j, part in enumerate(content):
        where = f"{path}[{j}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise FieldError(where, f'{where} must be {{"type": "text", "text": ...}}')
        if kind not in _TEXT_KEYS:
            raise FieldError(
                f"{where}.type", f"{where} is of type {quoted(kind)}; the model takes text only"
            )
        key = _TEXT_KEYS[kind]
        texts.append(_text(part.get(key), f"{where}.{key}"))
    return "\n".join(texts)


def _text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise FieldError(path, f"{path} must be text, not {quoted(value)}")
    return value


def read_function(value: Any, path: str) -> dict[str, Any]:
    """`function` of {"type": "function", "function": {"name": ...}}.

    Raises:
        FieldError: it is another value.
    """
    if not isinstance(value, dict):
        raise FieldError(path, f"{path} must be an object, not {quoted(value)}")
    if value.get("type", "function") != "function":
        raise FieldError(
            f"{path}.type", f'{path}.type must be "function", not {quoted(value["type"])}'
        )
    function = value.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise FieldError(f"{path}.function", f"{path}.function must be an object with a name")
    return function


def _definition(function: dict[str, Any], path: str) -> dict[str, Any]:
    """A definition with the three keys that prompts have. `strict` has no meaning here."""
    parameters = function.get("parameters")
    if not isinstance(parameters, (dict, type(None))):
        where = f"{path}.parameters"
        raise FieldError(
            where, f"{where} must be a JSON schema of an object, not {quoted(parameters)}"
        )
    strict = function.get("strict")
    if not isinstance(strict, (bool, type(None))):
        where = f"{path}.strict"
        raise FieldError(where, f"{where} must be true or false, not {quoted(strict)}")
    return {
        "name": function["name"],
        "description": _text(function.get("description") or "", f"{path}.description"),
        "parameters": {"type": "object", "properties": {}} | (parameters or {}),
    }
