"""JSON schemas of messages and tools in OpenAI's form, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from llama.text.openai_messages import MAX_MESSAGES, MAX_TOOLS

_PART = {
    "type": "object",
    "properties": {"type": {"enum": ["text"]}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]}
_CALL = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "type": {"enum": ["function"]},
        "function": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
                "arguments": {"type": "string", "description": "Text of a JSON object."},
            },
            "required": ["name", "arguments"],
        },
    },
    "required": ["id", "function"],
}


def _message_schema(roles: list[str], more: dict[str, Any], required: list[str]) -> dict[str, Any]:
    properties = {"role": {"enum": roles}, "content": _CONTENT}
    return {
        "type": "object",
        "properties": properties | more,
        "required": ["role", *required],
    }


MESSAGES_SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "maxItems": MAX_MESSAGES,
    "items": {
        "anyOf": [
            _message_schema(["system", "developer", "user"], {}, ["content"]),
            _message_schema(["assistant"], {}, ["content"]),
            _message_schema(
                ["assistant"],
                {
                    "content": {"anyOf": [_CONTENT, {"type": "null"}]},
                    "tool_calls": {
                        "type": "array",
                        "items": _CALL,
                        "minItems": 1,
                        "maxItems": MAX_TOOLS,
                    },
                },
                ["tool_calls"],
            ),
            _message_schema(
                ["tool"], {"tool_call_id": {"type": "string"}}, ["content", "tool_call_id"]
            ),
        ]
    },
}
_FUNCTION = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
        "description": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "parameters": {"anyOf": [{"type": "object"}, {"type": "null"}]},
        "strict": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    },
    "required": ["name"],
}
_TOOL = {
    "type": "object",
    "properties": {"type": {"enum": ["function"]}, "function": _FUNCTION},
    "required": ["function"],
}
TOOLS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": _TOOL,
    "minItems": 1,
    "maxItems": MAX_TOOLS,
}
_NAMED = {
    "type": "object",
    "properties": {
        "type": {"enum": ["function"]},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
        },
    },
    "required": ["function"],
}
TOOL_CHOICE_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "string", "enum": ["none", "auto", "required"]}, _NAMED]
}
