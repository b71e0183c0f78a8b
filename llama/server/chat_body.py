"""The body of POST /v1/chat/completions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from llama.server.chat_messages import read_messages, read_tool_choice, read_tools
from llama.server.chat_schemas import MESSAGES_SCHEMA, TOOL_CHOICE_SCHEMA, TOOLS_SCHEMA
from llama.server.common_body import (
    IDS,
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    CommonBody,
    check_refused,
)
from llama.server.errors import invalid, quoted
from llama.server.fields import Choice, Custom, Flag, Integer, Text, read_record, wire
from llama.text.json_schema import MAX_SCHEMA_BYTES
from llama.text.messages import Message
from llama.text.tool_prompt import TOOL_FORMS, ToolForm

REFUSED = {
    "functions": "use tools",
    "function_call": "use tool_choice",
    "audio": "the models write text only",
}


@dataclass(frozen=True)
class ResponseFormat:
    """What the answer must be.

    Attributes:
        type: "text", "json_object" or "json_schema".
        schema: the JSON schema, if the type is "json_schema".
    """

    type: str
    schema: dict[str, Any] | bool | None = None


def _read_format(value: Any, param: str) -> ResponseFormat:
    if not isinstance(value, dict):
        raise invalid(param, f"{param} must be an object with a type, not {quoted(value)}")
    kind = Choice(("text", "json_object", "json_schema")).read(value.get("type"), f"{param}.type")
    if kind != "json_schema":
        return ResponseFormat(kind)
    outer = value.get("json_schema")
    if not isinstance(outer, dict):
        raise invalid(
            f"{param}.json_schema", f'{param}.json_schema must be {{"name": ..., "schema": ...}}'
        )
    if outer.get("strict") is not None:
        Flag().read(outer["strict"], f"{param}.json_schema.strict")
    if "name" in outer:
        Text().read(outer["name"], f"{param}.json_schema.name")
    schema = outer.get("schema")
    where = f"{param}.json_schema.schema"
    if not isinstance(schema, (dict, bool)):
        raise invalid(where, f"{where} must be a JSON schema, not {quoted(schema)}")
    if len(json.dumps(schema)) > MAX_SCHEMA_BYTES:
        raise invalid(
            where, f"{where} has more than {MAX_SCHEMA_BYTES} characters; make it smaller"
        )
    return ResponseFormat(kind, schema)


_FORMAT_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "properties": {"type": {"enum": ["text", "json_object"]}},
            "required": ["type"],
        },
        {
            "type": "object",
            "properties": {
                "type": {"enum": ["json_schema"]},
                "json_schema": {
                    "type": "object",
                    "properties": {
                        "name": {"type": "string"},
                        "schema": {"anyOf": [{"type": "object"}, {"type": "boolean"}]},
                        "strict": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
                    },
                    "required": ["schema"],
                },
            },
            "required": ["type", "json_schema"],
        },
    ]
}


@dataclass(frozen=True, kw_only=True)
class ChatBody(CommonBody):
    """A checked body; see `CommonBody` for the other fields.

    Attributes:
        messages, tools: in the form of `llama.text`.
        tool_choice: "none", "auto", "required", or "function:" and the name of a tool; None
            where the body has none.
    """

    messages: tuple[Message, ...] = wire(
        Custom(read_messages, MESSAGES_SCHEMA),
        "The dialog. Content is text, or text parts, which are joined by line feeds; developer "
        "is system.",
    )
    max_completion_tokens: int | None = wire(
        Integer(1, MAX_TOKENS),
        "Most tokens to generate, cut to the room that is left. Default: all of it.",
        None,
    )
    max_tokens: int | None = wire(
        Integer(1, MAX_TOKENS), "As max_completion_tokens, which goes first.", None
    )
    logprobs: bool = wire(Flag(), "Log-probabilities of the tokens.", False)
    top_logprobs: int | None = wire(
        Integer(0, MAX_TOP_LOGPROBS),
        "With logprobs: this many most probable tokens at each place.",
        None,
    )
    response_format: ResponseFormat | None = wire(
        Custom(_read_format, _FORMAT_SCHEMA),
        "text, json_object or json_schema; see Structured output.",
        None,
    )
    tools: tuple[dict[str, Any], ...] = wire(
        Custom(read_tools, TOOLS_SCHEMA), "Functions that the model may call; see Tools.", ()
    )
    tool_choice: str | None = wire(
        Custom(read_tool_choice, TOOL_CHOICE_SCHEMA),
        "none, auto (the default with tools), required, or a named function.",
        None,
    )
    parallel_tool_calls: bool = wire(Flag(), "Whether an answer may have several calls.", True)
    tool_form: ToolForm = wire(
        Choice(TOOL_FORMS),
        "How the model writes calls: json (Llama 3.1), python_list (3.2, 3.3) or function_tag. "
        "Not in OpenAI's API.",
        "json",
    )
    continue_ids: tuple[int, ...] = wire(
        IDS,
        "Token ids with which the answer begins: the model goes on after them. Not in OpenAI's "
        "API.",
        (),
    )

    def __post_init__(self) -> None:
        self.check_common()
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "top_logprobs needs logprobs: true")
        choice = self.tool_choice or "auto"
        if choice not in ("none", "auto") and not self.tools:
            raise invalid("tool_choice", "tool_choice needs tools; define them, or leave it out")
        if self.named_tool and self.named_tool not in [tool["name"] for tool in self.tools]:
            raise invalid("tool_choice", f"tools define no {quoted(self.named_tool)}")
        if self.continue_ids and (self.forced_tools or self.constrained):
            raise invalid(
                "continue_ids", "continue_ids cannot go with response_format or a forced tool"
            )
        if self.forced_tools and self.constrained:
            raise invalid(
                "response_format", "response_format cannot go with a forced tool; leave one out"
            )

    @property
    def constrained(self) -> bool:
        """Whether response_format restricts the answer."""
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def offered_tools(self) -> tuple[dict[str, Any], ...]:
        """The tools that the prompt lists: none where tool_choice is "none"."""
        return () if self.tool_choice == "none" else self.tools

    @property
    def named_tool(self) -> str | None:
        """The tool that must be called, if the request names one."""
        choice = self.tool_choice or ""
        return choice.removeprefix("function:") if choice.startswith("function:") else None

    @property
    def forced_tools(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice == "required" or self.named_tool is not None

    @property
    def most_tokens(self) -> int | None:
        """The larger name goes first: OpenAI has replaced max_tokens by it."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens


def parse_chat(data: object) -> ChatBody:
    """A body from JSON.

    Raises:
        ApiError: 400, naming the field.
    """
    check_refused(data, REFUSED)
    if isinstance(data, dict) and data.get("modalities") not in (None, ["text"]):
        raise invalid("modalities", 'modalities must be ["text"]: the models write text only')
    return read_record(ChatBody, data)
