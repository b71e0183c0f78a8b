"""A stream is its completion: text, ids, log-probabilities, calls, reasons, usage.

Alone and beside seven other requests; the official client reads both.
"""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import openai
import pytest

from llama import Llama
from tests.server.folding import ask
from tests.server.running import NAME

PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 4},
        "days": {"type": "array", "items": {"enum": [1, 2.5, None]}, "maxItems": 2},
        "unit": {"enum": ["celsius", "fahrenheit", "😀"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": "The weather.", "parameters": PARAMETERS},
    }
    for name in ("get_weather", "weather.forecast")
]
FORMAT = {"type": "json_schema", "json_schema": {"name": "weather", "schema": PARAMETERS}}
NAMED = {"type": "function", "function": {"name": "get_weather"}}


FEW = {"top_k": 50}  # a sort of 128k logits for each token takes long
LIKE_PYTHON, LIKE_HTML = FEW | {"tool_form": "python_list"}, FEW | {"tool_form": "function_tag"}


def chat(seed: int, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "How is the weather in Zürich? 😀"}]
    common = {"model": NAME, "seed": seed, "extra_body": FEW, "max_completion_tokens": 8}
    return common | {"messages": messages, "logprobs": True, "top_logprobs": 2} | fields


def text(seed: int, **fields: Any) -> dict[str, Any]:
    common = {"model": NAME, "seed": seed, "extra_body": FEW, "max_tokens": 8}
    return common | {"prompt": "Once upon a time 😀", "logprobs": 2} | fields


def emoji_bias(llama: Llama) -> dict[str, int]:
    """Makes a random model write parts of emojis, which do not always fit together."""
    ids = {i for emoji in "😀🦙🇨🇭👩‍🚀" for i in llama.tokenizer.encode(emoji, bos=False)}
    return {str(i): 100 for i in ids}


def requests(llama: Llama) -> list[dict[str, Any]]:
    emojis, long = {"logit_bias": emoji_bias(llama)}, {"max_completion_tokens": 80}
    forced = {"tools": TOOLS, "tool_choice": "required"}
    return [
        chat(1),
        chat(2, temperature=0, logprobs=False, top_logprobs=None),
        chat(3, n=3),
        chat(4, **emojis),
        chat(5, **emojis, stop=["🦙", "\ufffd\ufffd\ufffd"]),
        chat(6, tools=TOOLS),
        chat(7, **forced, **long),
        chat(8, tools=TOOLS, tool_choice=NAMED, n=2, parallel_tool_calls=False, **long),
        chat(9, tools=TOOLS, tool_choice=NAMED),  # ends by its length
        chat(10, tools=TOOLS[:1], tool_choice=NAMED, **long, extra_body=LIKE_PYTHON),
        chat(11, **forced, **long, extra_body=LIKE_HTML),
        chat(12, response_format=FORMAT, **long),
        chat(13, frequency_penalty=1.5, presence_penalty=-1, extra_body={"min_p": 0.01}),
        text(14),
        text(15, prompt=["a", "The quick brown fox"], n=2, echo=True, logprobs=0),
        text(16, **emojis, n=2),
        text(17, **emojis, stop=["🦙", "🇨"], echo=True, logprobs=None),
        text(18, max_tokens=0, echo=True),
    ]  # fmt: skip


def check_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """The same but for the last bits of log-probabilities."""
    assert one["usage"] == two["usage"]
    for first, second in zip(one["choices"], two["choices"], strict=True):
        assert {**first, "logprobs": 0} == {**second, "logprobs": 0}
        assert rounded(first["logprobs"]) == rounded(second["logprobs"])


def rounded(value: Any) -> Any:
    """A nesting of lists in which numbers are equal if they are close."""
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return pytest.approx(value, abs=1e-3) if isinstance(value, float) else value


def test_alone_and_beside_others(tiny_llama: Llama, client: openai.OpenAI) -> None:
    cases = requests(tiny_llama)
    alone = [ask(client, case, stream=False) for case in cases]
    for case, expected in zip(cases, alone, strict=True):
        check_same(ask(client, case, stream=True), expected)
    jobs = [(i, i % 2 == 0) for i in range(len(cases))]
    random.Random(0).shuffle(jobs)
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda job: ask(client, cases[job[0]], job[1]), jobs)
        for (i, _), result in zip(jobs, results, strict=True):
            check_same(result, alone[i])
    check_contents(cases, alone)


def check_contents(cases: list[dict[str, Any]], replies: list[dict[str, Any]]) -> None:
    """The replies have what was asked for."""
    for case, reply in zip(cases, replies, strict=True):
        for choice in reply["choices"]:
            forced = case.get("tool_choice") is not None
            if choice["finish_reason"] == "tool_calls":
                assert choice["calls"] and choice["text"] == ""
            for name, arguments in choice["calls"]:
                assert name in ("get_weather", "weather.forecast")
                if choice["finish_reason"] == "tool_calls":
                    jsonschema.validate(json.loads(arguments), PARAMETERS)
            assert forced or not choice["calls"]
            if "response_format" in case and choice["finish_reason"] == "stop":
                jsonschema.validate(json.loads(choice["text"]), PARAMETERS)
            if case.get("logprobs") is True and not choice["calls"]:
                data = bytes(b for _, _, bytes_, *_ in choice["logprobs"] for b in bytes_)
                assert data.decode("utf-8", "replace") == choice["text"]
    reasons = {choice["finish_reason"] for reply in replies for choice in reply["choices"]}
    assert reasons == {"stop", "length", "tool_calls"}


def test_stop_strings_at_every_split(tiny_llama: Llama, client: openai.OpenAI) -> None:
    """The text ends where it begins, wherever tokens and characters end."""
    bias = {"logit_bias": emoji_bias(tiny_llama)}
    for case in (chat(4, **bias), text(14, max_tokens=8)):
        whole = ask(client, case, stream=False)["choices"][0]["text"]
        assert len(whole) > 5
        for start in range(0, len(whole), max(1, len(whole) // 5)):
            for length in (1, 7):
                stop = whole[start : start + length]
                stopped = case | {"stop": [stop, "never"]}
                reply = ask(client, stopped, stream=False)
                check_same(ask(client, stopped, stream=True), reply)
                [choice] = reply["choices"]
                assert choice["text"] == whole[: whole.find(stop)]
                assert choice["finish_reason"] == "stop"


def test_demo_model(demo_client: openai.OpenAI) -> None:
    """Real text, in ChatML."""
    for case in (
        chat(1, max_completion_tokens=8),
        text(3, prompt="The capital of France is", stop=["."]),
    ):
        reply = ask(demo_client, case, stream=False)
        check_same(ask(demo_client, case, stream=True), reply)
