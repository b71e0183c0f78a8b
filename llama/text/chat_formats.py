"""ChatML, and which built-in format writes what a chat template writes. Knows no token ids."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llama.text.chat_template import (
    ANSWER,
    SYSTEM,
    TOOL,
    USER,
    ChatTemplate,
    Messages,
    Piece,
    named_template,
    turn,
)
from llama.text.tool_prompt import ToolCall, encode_tool_calls, with_tools

# The system turn of the published templates of Llama 3.1 and later starts with two dates.
_DATES = re.compile(
    r"(<\|start_header_id\|>system<\|end_header_id\|>\n\n)"
    r"Cutting Knowledge Date: [^\n]*\nToday Date: [^\n]*\n\n(?:<\|eot_id\|>)?"
)
_LLAMA31_TOOLS = "Given the following functions, please respond with a JSON for a function call"


class ChatML:
    """ChatML: `<|im_start|>role`, newline, content, `<|im_end|>`, newline.

    Args:
        default_system: the system message of dialogs without one.
        bos: a special token before the first turn.
    """

    description = "ChatML"
    roles: tuple[str, ...] = ("system", "user", "assistant")
    tokens = ("<|im_start|>", "<|im_end|>")
    takes_tools = takes_calls = False

    def __init__(self, default_system: str | None = None, bos: str | None = None):
        self.default_system, self.bos = default_system, bos

    def header(self, role: str) -> list[Piece]:
        return [("<|im_start|>", True), (role + "\n", False)]

    def message(self, message: Mapping[str, Any]) -> list[Piece]:
        # Role and content are encoded as one text, as in training.
        text = f"{message['role']}\n{message['content']}"
        return [("<|im_start|>", True), (text, False), ("<|im_end|>", True), ("\n", False)]

    def prompt(self, dialog: Messages, tools: Sequence[Any] | None = None) -> list[Piece]:
        messages = list(dialog)
        if self.default_system and dialog[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.default_system})
        pieces: list[Piece] = [(self.bos, True)] if self.bos else []
        for message in messages:
            pieces += self.message(message)
        return pieces + self.header("assistant")


Writer = ChatML | ChatTemplate


def writer_of_results(
    writer: Writer,
    sources: Mapping[str, str],
    variables: Mapping[str, str],
    special: Collection[str],
) -> Writer:
    """What writes dialogs with results of tools: ChatML has no role for them, its template may."""
    if not isinstance(writer, ChatML) or "default" not in sources:
        return writer
    try:
        template = named_template(sources, "default", variables, special)
    except ValueError:
        return writer
    return template if "tool" in template.roles else writer


def is_result(message: object) -> bool:
    """Whether a message, which may be invalid, is a tool's result."""
    return isinstance(message, dict) and message.get("role") in ("ipython", "tool")


def recognise(template: ChatTemplate) -> tuple[str, str | None, str | None]:
    """Which built-in format writes what a template writes.

    Compares what they write, not the sources: published templates of one format differ in
    spaces, quotes, dates and order, and a small change in a source may change every prompt.

    Returns:
        ("llama3", None, None), ("chatml", its default system message, its begin token), or
        ("template", None, None) if neither format writes the same.
    """
    tried = [
        [turn("user", f" {USER} <image>\n")],
        [
            turn("system", f" {SYSTEM}\n"),
            turn("user", USER),
            turn("assistant", " a </think> b\n"),
            turn("user", "x"),
        ],
        [turn("user", USER), turn("user", ""), turn("assistant", ANSWER), turn("system", "y")],
    ]
    other = ("template", None, None)
    try:
        written = [template.text(dialog) for dialog in tried]
    except ValueError:
        return other
    if all(map(lambda text, dialog: _without_dates(text) == _llama3(dialog), written, tried)):
        with_tool = template.text(tried[0], [TOOL]) if template.takes_tools else _LLAMA31_TOOLS
        ours = _llama3(with_tools(tried[0], [TOOL]))
        known = _LLAMA31_TOOLS in with_tool or with_tool == ours
        known = known and (not template.takes_calls or _writes_calls_of_llama3(template))
        return ("llama3", None, None) if known else other
    bos = template.variables.get("bos_token") or None
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", _tail(written[0], bos), re.S)
    system = found[1] if found else None
    begin = bos if bos and written[0].startswith(bos) and bos != "<|im_start|>" else None
    chatml = ChatML(system, begin)
    same = all(chatml.prompt(dialog) == template.prompt(dialog) for dialog in tried)
    return (
        ("chatml", system, begin)
        if same and not (template.takes_tools or template.takes_calls)
        else other
    )


def _writes_calls_of_llama3(template: ChatTemplate) -> bool:
    """Whether calls are Meta's JSON, or that of Llama 3.1's published template."""
    call: ToolCall = {"name": TOOL["name"], "arguments": {"city": "Oslo"}}
    tools = [TOOL] if template.takes_tools else None
    try:
        asked = [turn("user", USER), {**turn("assistant", ""), "tool_calls": [call]}]
        written = template.text(asked, tools, answer=False)
    except ValueError:
        return False
    published = '{"name": "get_weather", "parameters": {"city": "Oslo"}}'
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    calls = (published, *encode_tool_calls([call]))
    return any(written.endswith(f"{header}{text}<|eot_id|>") for text in calls)


def _tail(text: str, bos: str | None) -> str:
    return text.removeprefix(bos) if bos and bos != "<|im_start|>" else text


def _llama3(dialog: Messages) -> str:
    """What Llama 3's format writes."""
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    turns = (f"{header.format(m['role'])}{m['content'].strip()}<|eot_id|>" for m in dialog)
    return f"<|begin_of_text|>{''.join(turns)}{header.format('assistant')}"


def _without_dates(text: str) -> str:
    """Without the two dates, and without the system turn if it has nothing else."""
    return _DATES.sub(lambda m: "" if m[0].endswith("<|eot_id|>") else m[1], text, count=1)
