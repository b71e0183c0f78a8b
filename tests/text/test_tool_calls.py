"""Writing and parsing tool calls, against llama-models."""

from __future__ import annotations

import random
from typing import Any

import pytest

from llama.text.tool_parser import ToolReply, parse_tool_calls
from llama.text.tool_prompt import TOOL_FORMS, ToolCall, encode_tool_call, encode_tool_calls
from tests.text.tool_calls import HOSTILE, random_call, random_plain_call, to_meta


@pytest.mark.parametrize("form", TOOL_FORMS)
def test_calls_are_written_like_metas(form: str) -> None:
    from llama_models.datatypes import ToolPromptFormat
    from llama_models.llama3.tool_utils import ToolUtils

    rng = random.Random(3)
    for _ in range(300):
        call = random_plain_call(rng, form)
        expected = ToolUtils.encode_tool_call(to_meta(call), ToolPromptFormat(form))
        assert encode_tool_call(call, form) == expected


@pytest.mark.parametrize("form", TOOL_FORMS)
def test_calls_are_parsed_like_metas(form: str, meta: Any) -> None:
    """Where Meta's code is right; it ends tags at the first brace, and changes quotes."""
    from llama_models.datatypes import StopReason

    rng, compared = random.Random(4), 0
    for _ in range(400):
        call = random_plain_call(rng, form)
        text = encode_tool_call(call, form)
        if call["name"] == "code_interpreter":
            text = "<|python_tag|>" + text
        try:
            theirs = meta.decode_assistant_message_from_content(text, StopReason.end_of_turn)
            [got] = theirs.tool_calls
        except Exception:
            continue
        name = getattr(got.tool_name, "value", got.tool_name)
        if (name, got.arguments) == (call["name"], call["arguments"]):
            compared += 1
            assert parse_tool_calls(text) == ToolReply("", [call])
    assert compared > 100


@pytest.mark.parametrize("form", TOOL_FORMS)
def test_round_trip_of_calls(form: str) -> None:
    rng = random.Random(5)
    for _ in range(1000):
        calls = [random_call(rng, HOSTILE) for _ in range(rng.choice([1, 1, 2, 3]))]
        text = "".join(encode_tool_calls(calls, form))
        if len(calls) == 1 and calls[0]["name"] == "code_interpreter":
            text = "Let me see:<|python_tag|>" + text
        reply = parse_tool_calls({"role": "assistant", "content": text})
        assert reply.problem is None, (text, reply.problem)
        assert reply.tool_calls == calls, text
        # Also after the tag, as the models write it.
        tagged = "<|python_tag|>" + text.split("see:<|python_tag|>")[-1]
        assert parse_tool_calls(tagged).tool_calls == calls, text


def test_backslashes_of_a_query() -> None:
    for query in (r"\frac{1}{2}", "C:\\", 'a "b" \\"c\\\\"', "\\", '"', "\\\\", "two\nlines"):
        call: ToolCall = {"name": "wolfram_alpha", "arguments": {"query": query}}
        assert parse_tool_calls(encode_tool_call(call)).tool_calls == [call]
    assert encode_tool_call(call | {"arguments": {"query": r"\frac{1}{2}"}}) == (
        r'wolfram_alpha.call(query="\frac{1}{2}")'
    )


def test_a_call_that_is_no_valid_python_is_json() -> None:
    call: ToolCall = {"name": "f", "arguments": {"a-b": 1}}
    for calls in ([call], [call, call]):
        assert (
            parse_tool_calls("".join(encode_tool_calls(calls, "python_list"))).tool_calls == calls
        )
    odd: ToolCall = {"name": "brave_search", "arguments": {"q": "x", "n": 3}}
    assert parse_tool_calls(encode_tool_call(odd)).tool_calls == [odd]
