"""Structured output on random weights: what a schema or a forced tool demands is what comes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import openai
import pytest
import torch

from llama import Llama
from llama.engine.request import Generation, Request
from llama.engine.sampling import Sampling
from llama.server.chat_body import parse_chat
from llama.server.constraints import constraint
from llama.server.errors import ApiError
from llama.text.tool_parser import parse_tool_calls
from tests.server.running import RunningServer
from tests.text.schemas import random_object, random_schema

HELLO: Any = [{"role": "user", "content": "Hello"}]
FREE = {"response_format": None, "max_tokens": 3}
OBJECT: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
}
OBJECT |= {"required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def many_slots(tiny_checkpoint: Callable[..., Path], demo_dir: Path) -> Llama:
    """Random weights with the demo model's vocabulary and ChatML: 16 slots."""
    folder = tiny_checkpoint(dim=32, n_layers=1, vocab_size=49152)
    return Llama.build(
        folder, demo_dir / "tokenizer.model", 512, 16, device="cpu", dtype=torch.float32
    )


def function(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def answers(llama: Llama, bodies: list[dict[str, Any]]) -> list[str | None]:
    """Texts of the answers; None for those that did not end by themselves."""
    requests = [
        Request(
            [1],
            450,
            Sampling(temperature=1.0),
            seed=seed,
            stop_tokens=llama.tokenizer.stop_tokens,
            grammar=constraint(llama, parse_chat({"messages": HELLO, **body})),
        )
        for seed, body in enumerate(bodies)
    ]

    def text(generation: Generation) -> str | None:
        assert generation.error is None
        ended = generation.finish_reason == "stop"
        return llama.tokenizer.decode(generation.ids) if ended else None

    return [text(generation) for generation in llama.engine.run(requests)]


def schema_of(seed: int) -> dict[str, Any]:
    return (random_object if seed % 2 else random_schema)(Random(seed), 2)


def test_200_answers_follow_their_schemas(many_slots: Llama) -> None:
    schemas = [schema_of(seed) for seed in range(200)]
    wanted = ({"type": "json_schema", "json_schema": {"name": "s", "schema": s}} for s in schemas)
    texts = answers(many_slots, [{"response_format": each} for each in wanted])
    for text, schema in zip(texts, schemas, strict=True):
        if text is not None:
            jsonschema.validate(
                json.loads(text),
                schema,
                jsonschema.Draft202012Validator,
                format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
            )
    assert sum(text is not None for text in texts) >= 180


def test_200_forced_calls_follow_their_parameters(many_slots: Llama) -> None:
    """Required, named, in parallel or not; ChatML has the form in JSON, whatever is asked."""
    schemas = [random_object(Random(seed), 2) for seed in range(200)]
    bodies = []
    for seed, schema in enumerate(schemas):
        named: Any = {"type": "function", "function": {"name": "g"}}
        bodies.append(
            {
                "tools": [function("f", schema), function("g", OBJECT)],
                "tool_choice": named if seed % 8 == 0 else "required",
                "parallel_tool_calls": seed % 4 == 0,
                "tool_form": "json" if seed % 3 else "function_tag",
            }
        )
    texts = answers(many_slots, bodies)
    for seed, (text, schema) in enumerate(zip(texts, schemas, strict=True)):
        if text is None:
            continue
        reply = parse_tool_calls(text)
        assert reply.tool_calls and not reply.content and text.startswith("{")
        assert seed % 4 == 0 or len(reply.tool_calls) == 1
        assert seed % 8 or {call["name"] for call in reply.tool_calls} == {"g"}
        for call in reply.tool_calls:
            jsonschema.validate(call["arguments"], {"f": schema, "g": OBJECT}[call["name"]])
    assert sum(text is not None for text in texts) >= 150


@pytest.mark.parametrize("form", ["json", "function_tag", "python_list"])
@pytest.mark.parametrize("stream", [False, True])
def test_forced_calls_over_http(server: RunningServer, form: str, stream: bool) -> None:
    tools: Any = [function("set", OBJECT), function("other", OBJECT)]
    called = set()
    for seed in range(3):
        with server.openai() as client:
            asked: dict[str, Any] = {
                "model": "tiny",
                "messages": HELLO,
                "tools": tools,
                "tool_choice": {"type": "function", "function": {"name": "set"}},
                "parallel_tool_calls": False,
                "temperature": 1,
                "seed": seed,
                "extra_body": {"tool_form": form},
            }
            if stream:
                with client.chat.completions.stream(**asked) as events:
                    choice: Any = events.get_final_completion().choices[0]
            else:
                choice = client.chat.completions.create(**asked).choices[0]
        assert choice.finish_reason == "tool_calls" and not choice.message.content
        [call] = choice.message.tool_calls
        assert call.function.name == "set"
        jsonschema.validate(json.loads(call.function.arguments), OBJECT)
        called.add(call.function.arguments)
    assert len(called) > 1


def test_a_schema_over_http(client: openai.OpenAI) -> None:
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "s", "schema": OBJECT}}
    reply = client.chat.completions.create(
        model="tiny", messages=HELLO, response_format=wanted, n=3, temperature=1, seed=1
    )
    for choice in reply.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), OBJECT)


def test_15_a_schema_that_compiles_for_ever_is_refused(server: RunningServer) -> None:
    """The 15th of the public failures: a deep schema, patterns that explode."""
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(300):
        deep = {"type": "array", "items": deep}
    patterns = [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnopqrstuvwxyz"]
    with server.http() as http:
        for schema in (deep, {"allOf": patterns}, {"$ref": "http://127.0.0.1:9/s.json"}):
            wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
            for body in (
                {"response_format": wanted},
                {
                    "tools": [function("f", {"properties": {"x": schema}})],
                    "tool_choice": "required",
                },
            ):
                reply = http.post("/v1/chat/completions", json={"messages": HELLO, **body})
                assert reply.status_code == 400, reply.text
                assert reply.json()["error"]["type"] == "invalid_request_error"
        assert http.get("/health").status_code == 200


def test_a_schema_that_explodes_while_an_answer_follows_it_is_a_400(server: RunningServer) -> None:
    schema = {"type": "string", "pattern": "^.*a.{200}$"}
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    body = {"messages": HELLO, "response_format": wanted, "temperature": 1, "seed": 0}
    with server.http() as http:
        reply = http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 400 and "too many states" in reply.json()["error"]["message"]
        assert http.post("/v1/chat/completions", json=body | FREE).is_success


def test_what_a_body_demands(tiny_llama: Llama) -> None:
    def grammar(**fields: Any) -> object:
        return constraint(tiny_llama, parse_chat({"messages": HELLO, **fields}))

    tools = [function("f", OBJECT)]
    assert grammar() is None and grammar(response_format={"type": "text"}) is None
    assert grammar(tools=tools) is None and grammar(tools=tools, tool_choice="none") is None
    assert grammar(response_format={"type": "json_object"}) is not None
    assert grammar(tools=tools, tool_choice="required") is not None
    schema = {"type": "array", "uniqueItems": True}
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    with pytest.raises(ApiError, match="uniqueItems") as caught:
        grammar(response_format=wanted)
    assert caught.value.param == "response_format.json_schema.schema"
    with pytest.raises(ApiError, match="cannot be used"):
        grammar(response_format={"type": "json_schema", "json_schema": {"schema": False}})


def test_ignore_eos_does_not_go_on_after_the_grammar(server: RunningServer) -> None:
    """Load generators send it with every request."""
    schema_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": OBJECT}}
    body = {"messages": HELLO, "ignore_eos": True, "max_tokens": 100, "n": 2, "seed": 3}
    with server.http() as http:
        reply = http.post("/v1/chat/completions", json=body | {"response_format": schema_format})
    for choice in reply.json()["choices"]:
        jsonschema.validate(json.loads(choice["message"]["content"]), OBJECT)
        assert choice["finish_reason"] == "stop"
