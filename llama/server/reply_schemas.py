"""JSON schemas of replies, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def array(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def const(value: str) -> Schema:
    return {"type": "string", "enum": [value]}


def record(optional: tuple[str, ...] = (), /, **properties: Schema) -> Schema:
    """An object that has all of these properties, but perhaps the optional ones."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def _reply(kind: str, choice: Schema, usage: Schema) -> Schema:
    return record(
        ("usage",) if "anyOf" in usage else (),
        id=TEXT,
        object=const(kind),
        created=COUNT,
        model=TEXT,
        system_fingerprint=TEXT,
        choices=array(choice),
        usage=usage,
    )


_CALL = record(id=TEXT, type=const("function"), function=record(name=TEXT, arguments=TEXT))
_CALL_DELTA = record(
    ("id", "type"),
    index=COUNT,
    id=TEXT,
    type=const("function"),
    function=record(("name", "arguments"), name=TEXT, arguments=TEXT),
)
_SCORED = {"token": TEXT, "bytes": array(COUNT), "logprob": NUMBER, "id": COUNT}
_CHAT_LOGPROBS = or_null(
    record(
        content=array(record(**_SCORED, top_logprobs=array(record(**_SCORED)))),
        refusal={"type": "null"},
    )
)
_TEXT_LOGPROBS = or_null(
    record(
        tokens=array(TEXT),
        token_logprobs=array(or_null(NUMBER)),
        top_logprobs=array(or_null({"type": "object", "additionalProperties": NUMBER})),
        text_offset=array(COUNT),
    )
)
_CHAT_REASON: Schema = {"type": "string", "enum": ["stop", "length", "tool_calls"]}
_TEXT_REASON: Schema = {"type": "string", "enum": ["stop", "length"]}
_MESSAGE = record(
    ("tool_calls",),
    role=const("assistant"),
    content=or_null(TEXT),
    refusal={"type": "null"},
    tool_calls=array(_CALL),
)
_DELTA = record(
    ("role", "content", "tool_calls"),
    role=const("assistant"),
    content=TEXT,
    tool_calls=array(_CALL_DELTA),
)

_PIECE: Schema = {"anyOf": [TEXT, array(COUNT)]}


def _choice(**properties: Schema) -> Schema:
    return record(index=COUNT, **properties)


def _text_choice(reason: Schema) -> Schema:
    return _choice(text=TEXT, logprobs=_TEXT_LOGPROBS, finish_reason=reason)


SCHEMAS: dict[str, Schema] = {
    "Usage": record(
        prompt_tokens=COUNT,
        completion_tokens=COUNT,
        total_tokens=COUNT,
        prompt_tokens_details=record(cached_tokens=COUNT),
    ),
    "ChatCompletion": _reply(
        "chat.completion",
        _choice(message=_MESSAGE, logprobs=_CHAT_LOGPROBS, finish_reason=_CHAT_REASON),
        ref("Usage"),
    ),
    "ChatCompletionChunk": _reply(
        "chat.completion.chunk",
        _choice(delta=_DELTA, logprobs=_CHAT_LOGPROBS, finish_reason=or_null(_CHAT_REASON)),
        or_null(ref("Usage")),
    ),
    "Completion": _reply("text_completion", _text_choice(_TEXT_REASON), ref("Usage")),
    "CompletionChunk": _reply(
        "text_completion", _text_choice(or_null(_TEXT_REASON)), or_null(ref("Usage"))
    ),
    "Model": record(
        id=TEXT,
        object=const("model"),
        created=COUNT,
        owned_by=TEXT,
        root=TEXT,
        parent=or_null(TEXT),
        max_model_len=COUNT,
        defaults=record(
            temperature=NUMBER,
            top_p=NUMBER,
            top_k=COUNT,
            min_p=NUMBER,
            presence_penalty=NUMBER,
            frequency_penalty=NUMBER,
        ),
        chat={"type": "boolean"},
        quantize=or_null(TEXT),
        dtype=TEXT,
    ),
    "Models": record(object=const("list"), data=array(ref("Model"))),
    "Tokens": record(
        tokens=array({"anyOf": [COUNT, record(id=COUNT, piece=_PIECE)]}),
        count=COUNT,
        max_model_len=COUNT,
    ),
    "Detokenized": record(prompt=TEXT, content=TEXT),
    "Error": record(error=record(message=TEXT, type=TEXT, param=or_null(TEXT), code=or_null(TEXT))),
}
