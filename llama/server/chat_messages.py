"""Messages and tools of a request: `llama.text.openai_messages`, with the API's errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from llama.server.errors import invalid, quoted
from llama.text.messages import Message
from llama.text.openai_messages import FieldError, MessageReader, read_function

Value = TypeVar("Value")
_READER = MessageReader()


def read_messages(value: Any, param: str) -> tuple[Message, ...]:
    """A dialog. Results of tools come in the order of the calls, as prompts have no ids.

    Raises:
        ApiError: a message is invalid; `param` is its path.
    """
    return _read(_READER.messages, value, param)


def read_tools(value: Any, param: str) -> tuple[dict[str, Any], ...]:
    """Definitions with name, description and parameters.

    Raises:
        ApiError: a definition is invalid, or there is none.
    """
    return _read(_READER.tools, value, param)


def read_tool_choice(value: Any, param: str) -> str:
    """ "none", "auto", "required", or the name of a tool after "function:"."""
    if isinstance(value, str) and value in ("none", "auto", "required"):
        return value
    if isinstance(value, dict):
        return f"function:{_read(read_function, value, param)['name']}"
    raise invalid(
        param,
        f'{param} must be "none", "auto", "required" or '
        f'{{"type": "function", "function": {{"name": ...}}}}, not {quoted(value)}',
    )


def _read(read: Callable[[Any, str], Value], value: Any, param: str) -> Value:
    try:
        return read(value, param)
    except FieldError as e:
        raise invalid(e.path, str(e)) from None
