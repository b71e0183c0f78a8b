"""SERVER.md section 1, row by row, over HTTP: what each field does, and which ones are refused.

- errors become the client's exceptions, no 5xx for bad input: test_errors_have_four_fields,
  test_2000_bodies_of_the_openapi_document
- chat stream, usage chunk, [DONE]: test_a_chat_stream_is_what_clients_expect,
  test_the_whole_reply_is_what_a_client_folds
- tool deltas: test_tool_calls_are_folded_as_the_client_does
- log-probabilities of chats and completions: test_bytes_of_logprobs_are_the_text,
  test_echo_scores_the_prompt
- max_tokens by default: test_default_of_max_tokens
- context_length_exceeded: test_too_long_a_prompt_is_what_clients_match
- 401, 403, 413, 415: test_api_key, test_foreign_host, test_body_limit, test_content_type
- 404, 405: test_unknown_models_and_methods
- 503 and Retry-After: test_a_burst_never_passes_the_queue, test_while_loading
- messages, tools: how they become prompts: test_messages_are_ours, test_special_roles_and_parts
- sampling fields: test_fields_that_take_the_most_probable_token, test_seed, test_logit_bias,
  test_penalties
- stop: test_stop
- n: test_answers_of_n_are_those_of_single_requests
- max_tokens, max_completion_tokens: test_limits_of_tokens
- top_logprobs: test_top_logprobs
- prompt, echo: test_prompts_of_every_form, test_echo_of_each_prompt
- tools, tool_choice, response_format: test_structured_answers
- ignored fields: test_ignored_fields_change_nothing
- accepted fields: test_accepted_fields
- refused fields: test_refused_fields_name_themselves
- cached tokens: test_cached_tokens
- /tokenize, /detokenize: test_tokens_there_and_back
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from tests.server.running import NAME, RunningServer

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}


def test_the_list_names_tests_that_exist() -> None:
    sources = "".join(path.read_text("utf-8") for path in Path(__file__).parent.rglob("test_*.py"))
    for name in re.findall(r"\btest_\w+", __doc__ or ""):
        assert f"def {name}(" in sources, name


def ask(server: RunningServer, path: str, **fields: Any) -> dict[str, Any]:
    """The reply to a request of 6 tokens, at temperature 0."""
    what = {"messages": HELLO} if path == CHAT else {"prompt": "Hello"}
    body = what | {"temperature": 0, "max_tokens": 6} | fields
    with server.http() as http:
        response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    reply: dict[str, Any] = response.json()
    return reply


def texts(reply: dict[str, Any]) -> list[str]:
    return [
        choice["message"]["content"] if "message" in choice else choice["text"]
        for choice in reply["choices"]
    ]


both = pytest.mark.parametrize("path", [CHAT, COMPLETE])


@both
def test_errors_have_four_fields(server: RunningServer, path: str) -> None:
    with server.http() as http:
        for body in ("[]", "{}", "{", '{"temperature": "x"}'):
            response = http.post(path, content=body, headers={"content-type": "application/json"})
            assert response.status_code == 400
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_default_of_max_tokens(server: RunningServer, tiny_llama: Llama) -> None:
    completion = ask(server, COMPLETE, max_tokens=None, ignore_eos=True)
    assert completion["usage"]["completion_tokens"] == 16
    chat = ask(server, CHAT, max_tokens=None, ignore_eos=True)
    assert chat["usage"]["total_tokens"] == tiny_llama.engine.room
    assert chat["choices"][0]["finish_reason"] == "length"


def test_unknown_models_and_methods(server: RunningServer) -> None:
    with server.http() as http:
        for path, body in ((CHAT, {"messages": HELLO}), (COMPLETE, {"prompt": "a"})):
            response = http.post(path, json=body | {"model": "gpt-4"})
            error = response.json()["error"]
            assert response.status_code == 404
            assert error["code"] == "model_not_found" and error["param"] == "model"
            assert http.get(path).status_code == 405
        assert http.get("/v1/models/gpt-4").status_code == 404
        assert http.post("/health").status_code == 405


def test_special_roles_and_parts(server: RunningServer) -> None:
    """developer is system; text parts are a text; content may be null beside tool_calls."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    parts = [{"type": "text", "text": "Hello"}]

    def prompt(*messages: dict[str, Any]) -> int:
        reply = ask(server, CHAT, messages=[*messages], max_tokens=1)
        return int(reply["usage"]["prompt_tokens"])

    system, developer = ({"role": role, "content": "Be x."} for role in ("system", "developer"))
    assert prompt(system, *HELLO) == prompt(developer, *HELLO)
    assert prompt({"role": "user", "content": parts}) == prompt(*HELLO)
    result = {"role": "tool", "tool_call_id": "a", "content": parts}
    assert prompt(*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, result)


@both
@pytest.mark.parametrize("field", [{"top_k": 1}, {"top_p": 0}, {"min_p": 1}])
def test_fields_that_take_the_most_probable_token(
    server: RunningServer, path: str, field: dict[str, float]
) -> None:
    greedy = texts(ask(server, path))
    assert texts(ask(server, path, temperature=2, seed=1)) != greedy
    assert texts(ask(server, path, temperature=2, seed=1, **field)) == greedy


@both
def test_seed(server: RunningServer, path: str) -> None:
    first, second, other = (
        texts(ask(server, path, temperature=1, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == second != other


@both
def test_logit_bias(server: RunningServer, tiny_llama: Llama, path: str) -> None:
    [token] = tiny_llama.tokenizer.encode("!", bos=False)
    assert texts(ask(server, path, logit_bias={str(token): 100})) == ["!" * 6]
    biased = ask(server, path, logit_bias={str(token): 100}, logprobs=1 if path != CHAT else True)
    assert "!" not in texts(ask(server, path, logit_bias={str(token): -100}))[0]
    logprobs = biased["choices"][0]["logprobs"]  # of the model, without the bias
    own = (
        logprobs["token_logprobs"] if path != CHAT else [t["logprob"] for t in logprobs["content"]]
    )
    assert all(logprob < -1 for logprob in own)


@both
@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty"])
def test_penalties(server: RunningServer, tiny_llama: Llama, path: str, field: str) -> None:
    """Two tokens are far ahead, one by less than the penalty: the other follows it."""
    a, b = (tiny_llama.tokenizer.encode(text, bos=False)[0] for text in "!?")
    bias = {str(a): 100, str(b): 100}
    favoured = "!" if texts(ask(server, path, logit_bias=bias)) == ["!" * 6] else "?"
    penalized = texts(ask(server, path, logit_bias=bias, **{field: 2}))[0]
    assert penalized[0] == favoured and set(penalized) == set("!?")


@both
@pytest.mark.parametrize("as_list", [False, True])
def test_stop(server: RunningServer, path: str, as_list: bool) -> None:
    [whole] = texts(ask(server, path))
    stop = whole[len(whole) // 2 :][:2]
    reply = ask(server, path, stop=["no such text", stop] if as_list else stop)
    assert texts(reply) == [whole[: whole.index(stop)]]
    assert reply["choices"][0]["finish_reason"] == "stop"


@both
def test_answers_of_n_are_those_of_single_requests(server: RunningServer, path: str) -> None:
    several = ask(server, path, n=3, seed=5, temperature=1)
    assert [choice["index"] for choice in several["choices"]] == [0, 1, 2]
    single = [texts(ask(server, path, seed=5 + j, temperature=1))[0] for j in range(3)]
    assert texts(several) == single and len(set(single)) == 3


def test_limits_of_tokens(server: RunningServer) -> None:
    for fields in ({"max_tokens": 3}, {"max_completion_tokens": 3, "max_tokens": 6}):
        reply = ask(server, CHAT, ignore_eos=True, **fields)
        assert reply["usage"]["completion_tokens"] == 3
        assert reply["choices"][0]["finish_reason"] == "length"


def test_top_logprobs(server: RunningServer) -> None:
    for entry in ask(server, CHAT, logprobs=True, top_logprobs=20)["choices"][0]["logprobs"][
        "content"
    ]:
        top = [other["logprob"] for other in entry["top_logprobs"]]
        assert len(top) == 20 and top == sorted(top, reverse=True)
        assert entry["logprob"] == top[0]
    assert ask(server, CHAT)["choices"][0]["logprobs"] is None


def test_echo_of_each_prompt(server: RunningServer, tiny_llama: Llama) -> None:
    given = ["Hello", "The sky 🙂"]
    ids = [tiny_llama.tokenizer.encode(text, bos=False) for text in given]
    for prompt in (given, ids):
        plain, echoed = (
            texts(ask(server, COMPLETE, prompt=prompt, echo=echo)) for echo in (False, True)
        )
        assert echoed == [a + b for a, b in zip(given, plain, strict=True)]
        alone = texts(ask(server, COMPLETE, prompt=prompt[0]))
        assert alone == plain[:1]


def test_structured_answers(server: RunningServer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    [text] = texts(ask(server, CHAT, response_format=wanted, max_tokens=60))
    assert json.loads(text)["a"] in (True, False)
    function = {"name": "f", "parameters": schema}
    named = {"type": "function", "function": {"name": "f"}}
    for choice in ("required", named):
        tools = [{"type": "function", "function": function}]
        reply = ask(server, CHAT, tools=tools, tool_choice=choice, max_tokens=100,
                    parallel_tool_calls=False)  # fmt: skip
        [call] = reply["choices"][0]["message"]["tool_calls"]
        assert reply["choices"][0]["finish_reason"] == "tool_calls"
        assert call["function"]["name"] == "f" and "a" in json.loads(call["function"]["arguments"])


@both
@pytest.mark.parametrize(
    "field",
    [
        {"user": "me"}, {"store": True}, {"metadata": {"a": "b"}}, {"service_tier": "auto"},
        {"prompt_cache_key": "k"}, {"safety_identifier": "s"}, {"reasoning_effort": "high"},
        {"verbosity": "low"}, {"no_such_field": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_ignored_fields_change_nothing(
    server: RunningServer, path: str, field: dict[str, Any]
) -> None:
    assert texts(ask(server, path, **field)) == texts(ask(server, path))


@both
def test_accepted_fields(server: RunningServer, path: str) -> None:
    assert texts(ask(server, path, stop=None)) == texts(ask(server, path))
    assert ask(server, path, ignore_eos=True)["usage"]["completion_tokens"] == 6
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": HELLO, "prompt": "Hello", "stream": True, "stream_options": options}
    with server.http() as http:
        lines = http.post(path, json=body | {"max_tokens": 3, "ignore_eos": True}).text.split(
            "\n\n"
        )
    usage = [json.loads(line[6:])["usage"]["completion_tokens"] for line in lines[:-2]]
    assert usage == sorted(usage) and usage[-1] == 3


@pytest.mark.parametrize(
    "path, fields, param",
    [
        (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
        (CHAT, {"messages": [{"role": "user", "content": [AUDIO]}]}, "messages[0].content[0].type"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"tools": []}, "tools"),
        (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
         "tool_choice"),
        (CHAT, {"tools": [{"function": {"name": "f", "strict": 1}}]}, "tools[0].function.strict"),
        (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        (COMPLETE, {"suffix": "x"}, "suffix"),
        (COMPLETE, {"best_of": 2}, "best_of"),
        (COMPLETE, {"stream_options": {}}, "stream_options"),
    ],
)  # fmt: skip
def test_refused_fields_name_themselves(
    server: RunningServer, path: str, fields: dict[str, Any], param: str
) -> None:
    body = {"messages": HELLO} if path == CHAT else {"prompt": "a"}
    with server.http() as http:
        response = http.post(path, json=body | fields)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_cached_tokens(server: RunningServer) -> None:
    messages = [{"role": "user", "content": "A prompt that no other test has. " * 5}]
    first, second = (ask(server, CHAT, messages=messages)["usage"] for _ in range(2))
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in (first, second)]
    assert cached[0] < 30 < cached[1] < second["prompt_tokens"] == first["prompt_tokens"]


def test_tokens_there_and_back(server: RunningServer, tiny_llama: Llama) -> None:
    text, special = "Hello 🙂 <|eot_id|>", set(tiny_llama.tokenizer.special_tokens.values())
    with server.http() as http:
        found = http.post("/tokenize", json={"content": text}).json()
        back = http.post("/detokenize", json={"tokens": found["tokens"]}).json()
        assert back["content"] == text and found["count"] == len(found["tokens"])
        assert not special & set(found["tokens"])
        model = http.get("/v1/models").json()["data"][0]
    assert model["id"] == NAME and model["max_model_len"] == found["max_model_len"]
