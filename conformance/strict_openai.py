"""The official Python client with strict validation: every field of every answer has its type.

Its types are wrong for two answers of `/v1/completions`, which are as OpenAI's are: the first
log-probability of a prompt is null, and so is `finish_reason` in all chunks but the last. Those
tests use the client without validation.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

MODEL = os.environ["CONFORMANCE_MODEL"]
HELLO: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Answer in one sentence."},
    {"role": "user", "content": "What is the capital of France?"},
]
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def make_client(strict: bool) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=os.environ["CONFORMANCE_URL"],
        api_key="none",
        max_retries=0,
        timeout=300,
        _strict_response_validation=strict,
    )


@pytest.fixture
def client() -> Iterator[openai.OpenAI]:
    with make_client(strict=True) as client:
        yield client


@pytest.fixture
def lenient_client() -> Iterator[openai.OpenAI]:
    with make_client(strict=False) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20)
    assert reply.choices[0].message.content
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_chat_stream_equals_the_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=20, temperature=0
    )
    stream = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert not last.choices and last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_helper_accumulates(client: openai.OpenAI) -> None:
    """`client.chat.completions.stream` folds the deltas itself."""
    with client.chat.completions.stream(model=MODEL, messages=HELLO, max_tokens=12) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds and final.choices[0].message.content


def test_several_answers(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5, n=3, seed=1)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]


def test_logprobs(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    choice = reply.choices[0]
    assert choice.logprobs is not None and choice.logprobs.content
    for token in choice.logprobs.content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert math.isclose(token.logprob, max(t.logprob for t in token.top_logprobs))
    written = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
    assert written.decode() == choice.message.content


def test_forced_tool(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
    )
    calls = reply.choices[0].message.tool_calls
    assert calls and calls[0].type == "function"
    assert set(json.loads(calls[0].function.arguments)) == {"city"}


def test_forced_tool_in_a_stream_and_its_result(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice="required"
    ) as stream:
        final = stream.get_final_completion()
    message = final.choices[0].message
    assert final.choices[0].finish_reason == "tool_calls" and message.tool_calls
    call = message.tool_calls[0]
    answered: list[ChatCompletionMessageParam] = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
            ],
        },
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    reply = client.chat.completions.create(model=MODEL, messages=answered, max_tokens=5)
    assert reply.choices[0].message.role == "assistant"


def test_json_schema(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "city",
                "strict": True,
                "schema": WEATHER["function"]["parameters"],
            },
        },
    )
    assert set(json.loads(reply.choices[0].message.content or "")) == {"city"}


def test_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt=["The sky", "The sea"], max_tokens=4, n=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]


def test_echo(lenient_client: openai.OpenAI) -> None:
    reply = lenient_client.completions.create(
        model=MODEL, prompt="The sky is", echo=True, logprobs=2, max_tokens=4
    )
    [choice] = reply.choices
    assert choice.text.startswith("The sky is")
    assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
    first, *rest = choice.logprobs.token_logprobs
    assert first is None and all(logprob <= 0 for logprob in rest)


def test_completions_stream(client: openai.OpenAI, lenient_client: openai.OpenAI) -> None:
    stream = lenient_client.completions.create(
        model=MODEL, prompt="The sky is", stream=True, temperature=0, max_tokens=6
    )
    text = "".join(chunk.choices[0].text for chunk in stream)
    whole = client.completions.create(model=MODEL, prompt="The sky is", temperature=0, max_tokens=6)
    assert text == whole.choices[0].text


def test_errors_are_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="unknown", messages=HELLO)
    with pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=9)
    assert e.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as e:
        client.completions.create(model=MODEL, prompt=[1] * 100_000)
    assert e.value.code == "context_length_exceeded"
    assert e.value.message.startswith("Error code: 400")
