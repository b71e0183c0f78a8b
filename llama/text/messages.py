"""Chat messages and their checks. Knows nothing about token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypedDict

from llama.text.tool_prompt import ToolCall

NO_TOOLS = (
    "this vocabulary has no tokens for tools, and no chat template that writes them; they need "
    "Llama 3.1 or later, or such a template"
)
Role = Literal["system", "user", "assistant", "ipython", "tool"]


class _AssistantFields(TypedDict, total=False):
    tool_calls: list[ToolCall]
    stop_reason: Literal["end_of_turn", "end_of_message"]


class Message(_AssistantFields):
    """One turn of a dialog.

    A tool's result has the role "ipython" or its synonym "tool". Messages of the assistant may
    have `tool_calls`, and a `stop_reason`: "end_of_message" if the model waits for tool results.
    """

    role: Role
    content: str


Dialog = Sequence[Message]


def check_dialog(dialog: object) -> None:
    """Check that a dialog is a list of at least one message.

    Raises:
        TypeError, ValueError: it is not.
    """
    if isinstance(dialog, (str, dict)) or not isinstance(dialog, Sequence):
        raise TypeError("a dialog is a list of {'role': ..., 'content': ...} messages")
    if not dialog:
        raise ValueError("the dialog is empty; give at least one message")


def check_message(message: Any, roles: Sequence[str], takes_tools: bool) -> None:
    """Check the keys of a message, their types and values.

    Args:
        roles: the roles that the chat format has.
        takes_tools: whether the chat format has tool calls.

    Raises:
        TypeError, ValueError: the message is invalid.
    """
    if not isinstance(message, dict) or not {"role", "content"} <= set(message):
        raise TypeError(f"a message is {{'role': ..., 'content': ...}}, not {message!r}")
    if message["role"] not in roles:
        raise ValueError(
            f"unknown role {message['role']!r}; this checkpoint's chat format has {list(roles)}"
        )
    if not isinstance(message["content"], str):
        raise TypeError(f"a message's content is a str, not {type(message['content'])}")
    if unknown := set(message) - {"role", "content", "tool_calls", "stop_reason"}:
        raise ValueError(f"unknown keys in a message: {sorted(unknown, key=str)}")
    reason = message.get("stop_reason", "end_of_turn")
    if reason not in ("end_of_turn", "end_of_message"):
        raise ValueError(f"stop_reason {reason!r}; use 'end_of_turn' or 'end_of_message'")
    keys = [key for key in ("tool_calls", "stop_reason") if message.get(key)]
    if keys and message["role"] != "assistant":
        raise ValueError(f"only an assistant's message has {keys[0]}")
    if (message.get("tool_calls") or reason == "end_of_message") and not takes_tools:
        raise ValueError(f"{keys[0]}: {NO_TOOLS}")
