"""Bodies of requests: what is read, and what is refused, naming the field."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from llama.server.chat_body import ChatBody, parse_chat
from llama.server.completion_body import CompletionBody, parse_completion
from llama.server.errors import MAX_BODY, ApiError, error_body
from llama.server.fields import read_json
from tests.server.wire_cases import HELLO, WEATHER, asked, chat, result

DEEP: dict[str, Any] = {}
for _ in range(40):
    DEEP = {"a": DEEP}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def message(**fields: Any) -> dict[str, Any]:
    return {"messages": [fields]}


def tool(**changes: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": WEATHER["function"] | changes}]


@pytest.mark.parametrize(
    "data, param, words",
    [
        ([], None, "JSON object"),
        ({}, "messages", "missing"),
        ({"messages": None}, "messages", "missing"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": "hi"}, "messages", "list of messages"),
        ({"messages": HELLO * 3000}, "messages", "at most 2048"),
        ({"messages": ["hi"]}, "messages[0]", "object with role"),
        (message(content="x"), "messages[0].role", '"system", "developer"'),
        (message(role="wizard", content="x"), "messages[0].role", "wizard"),
        (message(role=["user"], content="x"), "messages[0].role", "must be one of"),
        (message(role="user"), "messages[0].content", "null"),
        (message(role="user", content=None), "messages[0].content", "text"),
        (message(role="user", content=3), "messages[0].content", "text"),
        (message(role="user", content=["x"]), "messages[0].content[0]", "type"),
        (message(role="user", content=[{"type": "text"}]), "messages[0].content[0].text", "text"),
        (message(role="user", content=[IMAGE]), "messages[0].content[0].type", "text only"),
        (message(role="user", content=[AUDIO]), "messages[0].content[0].type", "text only"),
        (message(role="user", content="", tool_calls=[{}]), "messages[0].tool_calls", "assistant"),
        (message(role="assistant"), "messages[0].content", "text"),
        (message(role="assistant", tool_calls=[]), "messages[0].content", "text"),
        (message(role="assistant", tool_calls="x"), "messages[0].tool_calls", "list"),
        (message(role="assistant", tool_calls=["x"]), "messages[0].tool_calls[0]", "object"),
        (message(role="assistant", content="", audio={}), "messages[0].audio", "text only"),
        (
            message(role="assistant", content="", function_call={}),
            "messages[0].function_call",
            "use tool_calls",
        ),
        (message(role="tool", content="x"), "messages[0].tool_call_id", "id of a tool call"),
        ({"messages": [result("a", "x")]}, "messages[0].tool_call_id", "no tool call"),
        (
            {"messages": [asked(None, ("f", "{}")), result("a", "x"), result("a", "y")]},
            "messages[2].tool_call_id",
            "already",
        ),
        (
            {"messages": [asked(None, ("f", "{oops"))]},
            "messages[0].tool_calls[0].function.arguments",
            "Expecting",
        ),
        (
            {"messages": [asked(None, ("f", "[1]"))]},
            "messages[0].tool_calls[0].function.arguments",
            "object",
        ),
        (
            {"messages": [asked(None, ("f", '{"a": NaN}'))]},
            "messages[0].tool_calls[0].function.arguments",
            "number",
        ),
        (
            {"messages": [asked(None, ("f", "[" * 100_000))]},
            "messages[0].tool_calls[0].function.arguments",
            "deep",
        ),
        (
            {"messages": [asked(None, ("f<|eot_id|>", "{}"))]},
            "messages[0].tool_calls[0].function.arguments",
            "name",
        ),
        (chat(temperature="0.5"), "temperature", "number from 0 to 2"),
        (chat(temperature=True), "temperature", "number"),
        (chat(temperature=2.1), "temperature", "from 0 to 2"),
        (chat(temperature=-0.1), "temperature", "from 0 to 2"),
        (chat(temperature=float("nan")), "temperature", "number"),
        (chat(temperature=10**400), "temperature", "over 70 digits"),
        (chat(top_p=1.5), "top_p", "from 0 to 1"),
        (chat(min_p=[]), "min_p", "JSON array"),
        (chat(top_k=0.5), "top_k", "integer"),
        (chat(top_k=-2), "top_k", "from -1"),
        (chat(presence_penalty=3), "presence_penalty", "from -2 to 2"),
        (chat(frequency_penalty=float("-inf")), "frequency_penalty", "from -2 to 2"),
        (chat(seed=2**63), "seed", "integer"),
        (chat(seed=1.5), "seed", "integer"),
        (chat(n=0), "n", "from 1 to 16"),
        (chat(n=17), "n", "from 1 to 16"),
        (chat(n=True), "n", "integer"),
        (chat(max_tokens=0), "max_tokens", "from 1"),
        (chat(max_tokens=10**30), "max_tokens", "integer"),
        (chat(max_completion_tokens="9"), "max_completion_tokens", "integer"),
        (chat(stop=5), "stop", "text or a list"),
        (chat(stop=""), "stop", "empty"),
        (chat(stop=["a", ""]), "stop[1]", "empty"),
        (chat(stop=[1]), "stop[0]", "text"),
        (chat(stop=["x"] * 17), "stop", "at most 16"),
        (chat(stop="x" * 257), "stop", "at most 256"),
        (chat(stream="true"), "stream", "true or false"),
        (chat(stream_options={"include_usage": True}), "stream_options", "stream: true"),
        (chat(stream=True, stream_options=3), "stream_options", "object"),
        (
            chat(stream=True, stream_options={"include_usage": 1}),
            "stream_options.include_usage",
            "true or false",
        ),
        (chat(logprobs=2), "logprobs", "true or false"),
        (chat(top_logprobs=2), "top_logprobs", "logprobs: true"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs", "from 0 to 20"),
        (chat(logit_bias=[]), "logit_bias", "object"),
        (chat(logit_bias={"x": 1}), "logit_bias", "ids as text"),
        (chat(logit_bias={"-1": 1}), "logit_bias", "ids as text"),
        (chat(logit_bias={"5": 101}), "logit_bias.5", "from -100 to 100"),
        (chat(logit_bias={"5": "1"}), "logit_bias.5", "number"),
        (chat(logit_bias={str(i): 1 for i in range(301)}), "logit_bias", "at most 300"),
        (chat(tools=[]), "tools", "empty"),
        (chat(tools={}), "tools", "list"),
        (chat(tools=[WEATHER] * 129), "tools", "at most 128"),
        (chat(tools=[WEATHER, WEATHER]), "tools", "twice"),
        (chat(tools=["brave_search"]), "tools[0]", "object"),
        (chat(tools=[{"type": "web_search"}]), "tools[0].type", "function"),
        (chat(tools=[{"type": "function"}]), "tools[0].function", "name"),
        (chat(tools=tool(name="a b")), "tools[0].function", "name"),
        (chat(tools=tool(description=3)), "tools[0].function.description", "text"),
        (chat(tools=tool(parameters="x")), "tools[0].function.parameters", "JSON schema"),
        (chat(tools=tool(parameters={"type": "array"})), "tools[0].function", "object"),
        (chat(tools=tool(parameters=DEEP)), "tools[0].function", "deep"),
        (chat(tool_choice="required"), "tool_choice", "needs tools"),
        (chat(tool_choice=NAMED), "tool_choice", "needs tools"),
        (chat(tools=[WEATHER], tool_choice="maybe"), "tool_choice", "required"),
        (
            chat(tools=tool(name="other"), tool_choice=NAMED),
            "tool_choice",
            'define no "get_weather"',
        ),
        (chat(tools=[WEATHER], parallel_tool_calls=0), "parallel_tool_calls", "true or false"),
        (chat(response_format="json"), "response_format", "object"),
        (chat(response_format={"type": "yaml"}), "response_format.type", "json_schema"),
        (chat(response_format={"type": "json_schema"}), "response_format.json_schema", "schema"),
        (
            chat(response_format={"type": "json_schema", "json_schema": {"name": "x"}}),
            "response_format.json_schema.schema",
            "JSON schema",
        ),
        (
            chat(
                response_format={
                    "type": "json_schema",
                    "json_schema": {"schema": {"enum": ["x" * 70_000]}},
                }
            ),
            "response_format.json_schema.schema",
            "smaller",
        ),
        (
            chat(continue_ids=[1], response_format={"type": "json_object"}),
            "continue_ids",
            "response_format",
        ),
        (chat(continue_ids=[-1]), "continue_ids[0]", "integer"),
        (chat(continue_ids="x"), "continue_ids", "list"),
        (chat(tool_form="xml"), "tool_form", "python_list"),
        (chat(functions=[]), "functions", "use tools"),
        (chat(function_call="auto"), "function_call", "use tool_choice"),
        (chat(modalities=["text", "audio"]), "modalities", "text only"),
        (chat(audio={"voice": "x"}), "audio", "text only"),
        (chat(model=["x"]), "model", "text"),
    ],
)
def test_a_wrong_chat_body_names_its_field(data: Any, param: str | None, words: str) -> None:
    with pytest.raises(ApiError, match=re.escape(words)) as caught:
        parse_chat(data)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert len(error_body(caught.value)) <= MAX_BODY


@pytest.mark.parametrize(
    "data, param, words",
    [
        ({}, "prompt", "missing"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": 5}, "prompt", "token ids"),
        ({"prompt": {}}, "prompt", "token ids"),
        ({"prompt": [[]]}, "prompt[0]", "empty"),
        ({"prompt": [1, "a"]}, "prompt[1]", "integer"),
        ({"prompt": [1, -1]}, "prompt[1]", "integer"),
        ({"prompt": [True]}, "prompt[0]", "list of token ids"),
        ({"prompt": ["a", 1]}, "prompt[1]", "list of token ids"),
        ({"prompt": ["a"] * 129}, "prompt", "at most 128"),
        ({"prompt": ["a"] * 100, "n": 3}, "n", "at most 256"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "echo"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens", "from 0"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "integer"),
        ({"prompt": "a", "logprobs": 21}, "logprobs", "from 0 to 20"),
        ({"prompt": "a", "echo": 1}, "echo", "true or false"),
        ({"prompt": "a", "best_of": 2}, "best_of", "must be 1, not 2"),
        ({"prompt": "a", "suffix": "b"}, "suffix", "not supported"),
        ({"prompt": "a", "stream_options": {}}, "stream_options", "stream: true"),
    ],
)
def test_a_wrong_completion_body_names_its_field(data: Any, param: str, words: str) -> None:
    with pytest.raises(ApiError, match=re.escape(words)) as caught:
        parse_completion(data)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_null_is_the_default_and_unknown_keys_are_ignored() -> None:
    names = [name for name in ChatBody.__dataclass_fields__ if name != "messages"]
    body = parse_chat({"messages": HELLO} | dict.fromkeys(names))
    assert body == parse_chat({"messages": HELLO})
    ignored = {"user": "x", "store": True, "metadata": {"a": "b"}, "service_tier": "auto",
               "prompt_cache_key": "k", "safety_identifier": "s", "reasoning_effort": "low",
               "verbosity": "low", "what_is_this": [1]}  # fmt: skip
    assert parse_chat(chat(**ignored)) == body
    assert parse_completion({"prompt": "a", "suffix": None, "best_of": 1, **ignored}).prompt


def test_load_generators_are_understood() -> None:
    body = parse_chat(
        chat(
            stop=None,
            ignore_eos=True,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
    )
    assert body.ignore_eos and body.continuous_usage and body.stop == ()


def test_every_field_is_read() -> None:
    body = parse_chat(
        chat(
            model="m", temperature=1, top_p=0.5, top_k=-1, min_p=0.1, presence_penalty=1,
            frequency_penalty=-1, logit_bias={"5": -100}, seed=7, stop="end", n=2, logprobs=True,
            top_logprobs=3, max_tokens=5, max_completion_tokens=4, tools=[WEATHER],
            tool_choice=NAMED, parallel_tool_calls=False, tool_form="python_list",
        )
    )  # fmt: skip
    assert body.logit_bias == {5: -100} and body.stop == ("end",) and body.most_tokens == 4
    assert body.named_tool == "get_weather" and body.forced_tools and body.temperature == 1.0
    assert parse_chat(chat(n=2.0)).n == 2  # JSON has one kind of number
    for text in ("none", "auto"):
        assert not parse_chat(chat(tool_choice=text)).forced_tools
    none = parse_chat(chat(tools=[WEATHER], tool_choice="none"))
    assert none.tools and not none.offered_tools


def test_messages_are_ours() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    data = [
        {"role": "developer", "content": parts, "name": "x"},
        {"role": "user", "content": "q"},
        asked(None, ("f", '{"x": 1}'), ("g", "")),
        result("b", "second"),
        result("a", "first"),
        {"role": "assistant", "content": None, "refusal": "no"},
    ]
    assert [dict(message) for message in parse_chat({"messages": data}).messages] == [
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"name": "f", "arguments": {"x": 1}},
                {"name": "g", "arguments": {}},
            ],
        },
        {"role": "tool", "content": "first"},  # in the order of the calls
        {"role": "tool", "content": "second"},
        {"role": "assistant", "content": "no"},
    ]


def test_tools_may_lack_what_openai_lets_them_lack() -> None:
    bare = {"type": "function", "function": {"name": "now", "strict": True, "parameters": None}}
    properties: dict[str, Any] = {"properties": {"a": {}}}
    loose = {"type": "function", "function": {"name": "f", "parameters": properties}}
    assert parse_chat(chat(tools=[bare, loose])).tools == (
        {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
        {"name": "f", "description": "", "parameters": {"type": "object", **properties}},
    )


@pytest.mark.parametrize(
    "prompt, read",
    [
        ("a", ("a",)),
        ("", ("",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
        (["a", [2, 3]], ("a", (2, 3))),
    ],
)
def test_prompts_of_every_form(prompt: Any, read: Any) -> None:
    assert parse_completion({"prompt": prompt}).prompt == read
    body = parse_completion({"prompt": prompt, "echo": True, "max_tokens": 0, "logprobs": 0})
    assert isinstance(body, CompletionBody) and body.logprobs == 0


@pytest.mark.parametrize(
    "body, words",
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'"\xff"', "UTF-8"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"[" * 101 + b"]" * 101, "100 levels"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "100 levels"),
    ],
)
def test_what_is_not_json_is_a_400(body: bytes, words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        read_json(body)
    assert caught.value.status == 400


def test_json_is_read() -> None:
    assert read_json(b"[" * 100 + b"]" * 100)
    value = {"a": ["\u00e9\U0001f600", 1, 1.5, None, True], "b": {"c": ""}}
    assert read_json(json.dumps(value).encode()) == value
    assert read_json(json.dumps(value, ensure_ascii=False).encode()) == value
    assert read_json(b'{"\\ud83d": ["x\\uDE00y"]}') == {"\ufffd": ["x\ufffdy"]}


@pytest.mark.parametrize("text", ["x" * 10_000, "\U0001f600" * 10_000, "\0\n" * 5000, "\ud800" * 9])
def test_error_bodies_are_small_ascii(text: str) -> None:
    body = error_body(ApiError(400, text, param=text, code="x"))
    error = json.loads(body)["error"]
    assert len(body) <= MAX_BODY and body.isascii()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"][:3] == text[:3]
