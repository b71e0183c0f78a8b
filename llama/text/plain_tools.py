"""Tools for chat formats without them, such as ChatML: everything is written as ordinary messages.

A model that was not trained for tools calls one reliably only where a grammar forces it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from llama.text.messages import Message
from llama.text.tool_prompt import Tool, check_tools, encode_tool_calls


def with_plain_tools(
    dialog: Sequence[Message], tools: Sequence[Tool], default_system: str | None = None
) -> list[Message]:
    """A dialog whose system message lists the tools; calls and results become text.

    Calls have the form "json" of `encode_tool_calls`, which `parse_tool_calls` reads. A result is
    a message of the user.

    Args:
        tools: definitions. Without any, calls and results only are rewritten.
        default_system: what the system message begins with in a dialog without one.

    Raises:
        TypeError, ValueError: a tool or a call is invalid, or a tool is one of Meta's built-in.
    """
    messages = [_plain(message) for message in dialog]
    if not tools:
        return messages
    builtin, functions = check_tools(tools, "json")
    if builtin:
        raise ValueError(f"this chat format has no built-in tools {builtin}; define them")
    system = default_system or ""
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"]
    listed = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    text = (
        f"You can call these functions:\n{listed}\n\n"
        "To call one, answer with nothing but JSON of this form:\n"
        '{"type": "function", "name": "name of the function", "parameters": {"argument": "value"}}'
    )
    return [{"role": "system", "content": f"{system}\n\n{text}".strip()}, *messages]


def _plain(message: Message) -> Message:
    """A message with role and content alone."""
    if message["role"] in ("ipython", "tool"):
        return {"role": "user", "content": f"The function returned:\n{message['content']}"}
    calls = "; ".join(encode_tool_calls(message.get("tool_calls") or []))
    parts = [message["content"], calls]
    return {"role": message["role"], "content": "\n".join(filter(None, parts))}
