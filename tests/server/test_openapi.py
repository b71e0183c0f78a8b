"""The OpenAPI document. Oracles: jsonschema, the openai package's types."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, get_type_hints

import pytest
from jsonschema import Draft202012Validator
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as Chat
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as Texts

from llama.server.chat_body import parse_chat
from llama.server.completion_body import parse_completion
from llama.server.errors import ApiError, error_body
from llama.server.openapi import openapi
from llama.server.token_bodies import parse_detokenize, parse_tokenize
from tests.server.running import RunningServer
from tests.server.wire_cases import HELLO, WEATHER, asked, chat, result

DOCUMENT = openapi()
PARSERS = {
    "ChatBody": parse_chat,
    "CompletionBody": parse_completion,
    "TokenizeBody": parse_tokenize,
    "DetokenizeBody": parse_detokenize,
}


def validator(name: str) -> Any:
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}"} | DOCUMENT)


def test_the_document_is_json_and_its_schemas_are_valid() -> None:
    assert json.loads(json.dumps(DOCUMENT, allow_nan=False)) == DOCUMENT
    schemas = DOCUMENT["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    text = json.dumps(DOCUMENT)
    for name in schemas:
        assert f'"#/components/schemas/{name}"' in text, f"{name} is used nowhere"
    for part in text.split('"#/components/schemas/')[1:]:
        assert part.split('"')[0] in schemas


@pytest.mark.parametrize(
    "body, params, ours",
    [
        ("ChatBody", Chat, {"top_k", "min_p", "ignore_eos", "tool_form", "continue_ids"}),
        ("CompletionBody", Texts, {"top_k", "min_p", "ignore_eos"}),
    ],
)
def test_fields_are_openais_but_for_some(body: str, params: Any, ours: set[str]) -> None:
    fields = set(DOCUMENT["components"]["schemas"][body]["properties"])
    assert fields - set(get_type_hints(params)) == ours


@pytest.mark.parametrize(
    "data",
    [
        chat(n=2, stop=["a"], stream=True, stream_options={"include_usage": True}),
        chat(tools=[WEATHER], tool_choice="auto", logit_bias={"1": 2}, top_p=None),
        {"messages": [*HELLO, asked(None, ("f", "{}")), result("a", "x")]},
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
    ],
)
def test_what_is_read_is_valid(data: dict[str, Any]) -> None:
    validator("ChatBody").validate(data)
    parse_chat(data)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"messages": []},
        chat(n=True),
        chat(n=17),
        chat(temperature="1"),
        chat(stop=5),
        chat(tools=[]),
        chat(logit_bias={"x": 1}),
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
    ],
)
def test_what_is_refused_is_not_valid(data: dict[str, Any]) -> None:
    assert not validator("ChatBody").is_valid(data)
    with pytest.raises(ApiError):
        parse_chat(data)


FULL: dict[str, dict[str, Any]] = {
    "ChatBody": {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "a"}]},
            asked(None, ("get_weather", '{"city": "Oslo"}')),
            result("a", "rain"),
        ],
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "response_format": {"type": "text"},
        "stop": ["a", "b"],
        "logit_bias": {"5": 1},
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "n": 2,
        "continue_ids": [],
        "modalities": ["text"],
    },
    "CompletionBody": {"prompt": [[1, 2], [3]], "stop": "a", "logit_bias": {"5": 1}, "n": 1},
    "TokenizeBody": {"messages": HELLO, "tools": [WEATHER]},
    "DetokenizeBody": {"tokens": [1, 2]},
}
JUNK: list[Any] = [
    None, True, 0, -1, 1.5, 10**40, float("nan"), "", "a", "\x00\ud800", [], [[]], [None], {},
    {"a": {}}, {"type": "function"}, [{"type": "text", "text": 1}],
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from places(inner)


@pytest.mark.parametrize("name", PARSERS)
def test_junk_at_any_place_is_read_or_a_400_that_names_a_field(name: str) -> None:
    PARSERS[name](FULL[name])
    validator(name).validate(FULL[name])
    refused = 0
    for i in range(len(list(places(FULL[name])))):
        for junk in JUNK:
            data = copy.deepcopy(FULL[name])
            container, key = list(places(data))[i]
            container[key] = junk
            try:
                PARSERS[name](data)
            except ApiError as e:
                refused += 1
                assert e.status == 400 and e.param, e
                validator("Error").validate(json.loads(error_body(e)))
    assert refused > 30


def test_what_the_server_sends_is_valid(server: RunningServer) -> None:
    """Replies and chunks of both endpoints, models, ids, errors."""
    scored = {"logprobs": True, "top_logprobs": 2, "n": 2, "tools": [WEATHER], "max_tokens": 8}
    text = {"prompt": ["a", "b"], "echo": True, "logprobs": 1, "max_tokens": 3}
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("/v1/chat/completions", chat(max_tokens=2), "ChatCompletion"),
        ("/v1/chat/completions", chat(**scored, tool_choice="required"), "ChatCompletion"),
        ("/v1/chat/completions", chat(**scored, **usage), "ChatCompletionChunk"),
        ("/v1/chat/completions", chat(n=99), "Error"),
        ("/v1/completions", text, "Completion"),
        ("/v1/completions", text | usage, "CompletionChunk"),
        ("/tokenize", {"messages": HELLO, "with_pieces": True}, "Tokens"),
        ("/detokenize", {"tokens": [1, 2]}, "Detokenized"),
        ("/nowhere", {}, "Error"),
    ]
    with server.http() as http:
        assert http.get("/openapi.json").json() == DOCUMENT
        validator("Models").validate(http.get("/v1/models").json())
        for path, data, name in cases:
            reply = http.post(path, json=data)
            events = [reply.text] if "stream" not in data else reply.text.split("data: ")[1:-1]
            for event in events:
                validator(name).validate(json.loads(event))
