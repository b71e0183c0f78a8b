"""The official Python client, which checks the form of each answer: endpoints, helpers, errors."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

from llama import Llama
from tests.server.running import NAME, RunningServer, generations, slowed

HELLO: list[Any] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hello 😀"}]},
]


def chat(**fields: Any) -> dict[str, Any]:
    common = {"model": NAME, "messages": HELLO, "max_completion_tokens": 6}
    return common | {"extra_body": {"top_k": 50}} | fields


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list()
    assert client.models.retrieve(model.id) == model
    extra = model.model_extra or {}
    assert (extra["max_model_len"], extra["chat"], extra["dtype"]) == (512, True, "float32")


def test_whole_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(**chat())
    [choice] = reply.choices
    assert (reply.object, reply.model, reply.id[:9]) == ("chat.completion", NAME, "chatcmpl-")
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "length", "assistant")
    assert choice.logprobs is None and choice.message.tool_calls is None
    assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 6
    again = client.chat.completions.create(**chat())
    assert again.id != reply.id
    assert again.usage and again.usage.prompt_tokens_details
    assert again.usage.prompt_tokens_details.cached_tokens, "the prompt is still cached"


def test_stream_of_a_chat(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(**chat(), stream=True))
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant" and all(delta.role is None for delta in deltas[1:])
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert (chunks[-1].choices[0].finish_reason, deltas[-1].content) == ("length", None)
    assert all(chunk.usage is None for chunk in chunks)
    options: Any = {"include_usage": True}
    *most, last = client.chat.completions.create(**chat(), stream=True, stream_options=options)
    assert last.choices == [] and last.usage and last.usage.completion_tokens == 6
    assert all(chunk.usage is None for chunk in most)


def test_log_probabilities(client: openai.OpenAI) -> None:
    """Greedy: each token is the most probable one; the bytes are those of the text."""
    request = chat(temperature=0, logprobs=True, top_logprobs=5)
    [choice] = client.chat.completions.create(**request).choices
    entries = (choice.logprobs and choice.logprobs.content) or []
    assert len(entries) == 6
    assert b"".join(bytes(e.bytes or []) for e in entries).decode() == choice.message.content
    for entry in entries:
        tops = [top.logprob for top in entry.top_logprobs]
        assert len(tops) == 5 and tops == sorted(tops, reverse=True)
        assert entry.logprob == pytest.approx(tops[0])
        assert sum(map(math.exp, tops)) <= 1


def test_seeds_and_n(client: openai.OpenAI) -> None:
    """The same seed gives the same texts; the answers differ, and answer j has the seed + j."""

    def texts(**fields: Any) -> list[str | None]:
        reply = client.chat.completions.create(**chat(temperature=1, **fields))
        assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
        return [choice.message.content for choice in reply.choices]

    three = texts(seed=7, n=3)
    assert texts(seed=7, n=3) == three and len(set(three)) == 3
    assert texts(seed=8, n=2) == three[1:]


def test_text_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model=NAME, prompt=["Once upon", "a time"], max_tokens=3, n=2, logprobs=2, temperature=0
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.choices[0].text == reply.choices[1].text != reply.choices[2].text
    for choice in reply.choices:
        assert choice.logprobs and choice.logprobs.tokens and choice.logprobs.token_logprobs
        assert "".join(choice.logprobs.tokens) == choice.text
        assert len(choice.logprobs.token_logprobs) == 3
    default = client.completions.create(model=NAME, prompt="Once", temperature=0)
    assert default.usage and default.usage.completion_tokens == 16


def test_logit_bias_and_stop(client: openai.OpenAI, tiny_llama: Llama) -> None:
    [id] = tiny_llama.tokenizer.encode(" llama", bos=False)
    request = chat(logit_bias={str(id): 100})
    assert client.chat.completions.create(**request).choices[0].message.content == " llama" * 6
    [choice] = client.chat.completions.create(**request, stop=["a l"]).choices
    assert (choice.message.content, choice.finish_reason) == (" llam", "stop")


class Person(BaseModel):
    """What the answer must be."""

    name: str = Field(max_length=4)
    size: Literal["small", "tall"]
    numbers: list[Literal[1, 2]] = Field(max_length=2)


def test_parse_and_stream_helpers(client: openai.OpenAI) -> None:
    """A pydantic model as response_format: `strict` schemas of the client are taken."""
    request = chat(max_completion_tokens=150, seed=1, response_format=Person)
    parsed = client.chat.completions.parse(**request).choices[0].message.parsed
    assert isinstance(parsed, Person)
    with client.chat.completions.stream(**request) as stream:
        types = {event.type for event in stream}
        final = stream.get_final_completion().choices[0].message
    assert types == {"chunk", "content.delta", "content.done"}
    assert final.parsed == parsed
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**request | {"max_completion_tokens": 2})


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "model"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": HELLO * 300}, openai.BadRequestError, "messages"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs"),
        ({"stop": [""]}, openai.BadRequestError, "stop[0]"),
        ({"response_format": {"type": "xml"}}, openai.BadRequestError, "response_format.type"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_requests(
    client: openai.OpenAI,
    fields: dict[str, Any],
    kind: type[openai.APIStatusError],
    param: str,
    stream: bool,
) -> None:
    with pytest.raises(kind) as error:
        client.chat.completions.create(**chat(**fields), stream=stream)
    assert error.value.param == param
    assert error.value.type == "invalid_request_error" and error.value.body
    if len(fields.get("messages", ())) > 100:
        assert error.value.code == "context_length_exceeded"
        assert "This model's maximum context length is 512 tokens" in error.value.message


def test_wrong_key(start_server: Callable[..., RunningServer]) -> None:
    server = start_server(api_key="secret").wait_until_ready()
    with pytest.raises(openai.AuthenticationError):
        server.openai("wrong").models.list()
    assert server.openai("secret").chat.completions.create(**chat()).choices


def test_deadline(start_server: Callable[..., RunningServer], tiny_llama: Llama) -> None:
    """A 504 that the client does not send again; in a stream that has begun, an error."""
    server = start_server(request_timeout=0.5).wait_until_ready()
    client = server.openai().with_options(max_retries=2)
    with slowed(tiny_llama, 0.1):
        with pytest.raises(openai.InternalServerError) as error:
            client.chat.completions.create(**chat(max_completion_tokens=100))
        assert (error.value.status_code, error.value.code) == (504, "timeout")
        stream = client.chat.completions.create(**chat(max_completion_tokens=100), stream=True)
        with pytest.raises(openai.APIError, match="request_timeout"):
            list(stream)


def test_async_client_cancels(server: RunningServer, tiny_llama: Llama) -> None:
    """A cancelled task, a closed stream and a timeout end the generation."""
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    long = chat(max_completion_tokens=400)

    async def cancel_whole() -> None:
        task = asyncio.create_task(client.chat.completions.create(**long))
        while not generations(server):
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    async def close_stream() -> None:
        async with await client.chat.completions.create(**long, stream=True) as stream:
            async for _ in stream:
                break

    async def time_out() -> None:
        with pytest.raises(openai.APITimeoutError):
            await client.with_options(timeout=0.3).chat.completions.create(**long)

    async def run_all() -> None:
        for part in (cancel_whole, close_stream, time_out):
            await part()
            while generations(server):
                await asyncio.sleep(0.005)
        whole, stream = await asyncio.gather(
            client.chat.completions.create(**chat(temperature=0)),
            client.chat.completions.create(**chat(temperature=0), stream=True),
        )
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert "".join(parts) == whole.choices[0].message.content
        await client.close()

    with slowed(tiny_llama, 0.02):
        asyncio.run(run_all())
