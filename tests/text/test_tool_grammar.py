"""Forced tool calls: `parse_tool_calls` reads each text back as valid calls, and nothing else."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import pytest

from llama.text.grammar import Grammar
from llama.text.plain_tools import with_plain_tools
from llama.text.tool_grammar import MAX_CALLS, tool_call_grammar
from llama.text.tool_parser import ToolReply, parse_tool_calls
from llama.text.tool_prompt import TOOL_FORMS, ToolForm
from llama.tokenizer import Tokenizer
from tests.text.schemas import random_object

ROWS = 512


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(byte_tokenizer_path)


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {}} | parameters
    return {"name": name, "description": "d", "parameters": parameters}


ARGUMENTS = {
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "unit": {"enum": ["C", "F", 'q"\\', "é", "</function>", "<|python_tag|>"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 99},
        "more": {"anyOf": [{"type": "boolean"}, {"type": "null"}, {"$ref": "#/$defs/list"}]},
    },
    "required": ["unit"],
    "$defs": {
        "list": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}}
        | {"maxItems": 2}
    },
}
WEATHER, PING, DOTTED = tool("get_weather", **ARGUMENTS), tool("ping"), tool("a.b-c")


def answers(grammar: Grammar, tokenizer: Tokenizer, count: int) -> list[ToolReply]:
    """Parsed texts of random tokens."""
    replies = []
    for seed in range(count):
        ids: list[int] = []
        random, state = Random(seed), grammar.start()
        while not set(ids) & set(tokenizer.stop_tokens):
            ids.append(random.choice(state.allowed().nonzero().flatten().tolist()))
            state.accept(ids[-1])
        replies.append(parse_tool_calls(tokenizer.decode_bytes(ids[:-1]).decode()))
    return replies


def check(replies: list[ToolReply], tools: list[dict[str, Any]]) -> set[str]:
    """The names that are called; fails for what is no valid call of one of the tools."""
    schemas = {t["name"]: t["parameters"] | {"additionalProperties": False} for t in tools}
    for reply in replies:
        assert reply.tool_calls and not reply.content and reply.problem is None
        for call in reply.tool_calls:
            jsonschema.validate(call["arguments"], schemas[call["name"]])
    return {call["name"] for reply in replies for call in reply.tool_calls}


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("form", TOOL_FORMS)
def test_calls_are_read_back(tokenizer: Tokenizer, form: ToolForm, parallel: bool) -> None:
    tools = [WEATHER, PING]
    grammar = tool_call_grammar(tokenizer, tools, ROWS, form=form, parallel=parallel)
    replies = answers(grammar, tokenizer, 40)
    assert check(replies, tools) == {"get_weather", "ping"}
    most = max(len(reply.tool_calls) for reply in replies)
    assert 1 < most <= MAX_CALLS if parallel else most == 1


@pytest.mark.parametrize("form", TOOL_FORMS)
def test_random_parameters(tokenizer: Tokenizer, form: ToolForm) -> None:
    for seed in range(15):
        parameters = random_object(Random(seed), 2)
        if form == "python_list":
            kept = [name for name in parameters["properties"] if name.isidentifier()]
            kept = [name for name in kept if name.isascii()]
            parameters["properties"] = {name: parameters["properties"][name] for name in kept}
            parameters["required"] = [name for name in parameters["required"] if name in kept]
        tools = [tool("f", **parameters)]
        grammar = tool_call_grammar(tokenizer, tools, ROWS, form=form, parallel=False)
        check(answers(grammar, tokenizer, 2), tools)


def test_the_named_tools_only(tokenizer: Tokenizer) -> None:
    tools = [WEATHER, PING, DOTTED]
    grammar = tool_call_grammar(tokenizer, tools, ROWS, names=["ping"])
    assert check(answers(grammar, tokenizer, 5), tools) == {"ping"}
    grammar = tool_call_grammar(tokenizer, tools, ROWS, names=["ping", "a.b-c"])
    assert check(answers(grammar, tokenizer, 20), tools) == {"ping", "a.b-c"}


@pytest.mark.parametrize(
    "parameters",
    [
        {"anyOf": [{"required": ["x"]}], "properties": {"x": {"type": "boolean"}}},
        {"properties": {"x": {"type": "null"}, "y": {"$ref": "#/properties/x"}}},
    ],
)
def test_python_lists_are_json_where_python_cannot_say_it(
    tokenizer: Tokenizer, parameters: dict[str, Any]
) -> None:
    tools = [tool("f", **parameters), PING]
    grammar = tool_call_grammar(tokenizer, tools, ROWS, form="python_list")
    assert grammar.start().allowed().nonzero().flatten().tolist() == [ord("{")]
    assert check(answers(grammar, tokenizer, 10), tools) == {"f", "ping"}


@pytest.mark.parametrize(
    ("tools", "names", "message"),
    [
        ([], None, "no tool to call"),
        ([PING], ["pong"], "no tool to call"),
        ([PING], ["ping", "pong"], "no tool to call"),
        (["brave_search"], None, "cannot be forced"),
        ([tool("f", properties={"__class__": {}})], None, "not the name of an argument"),
        ([tool("f", properties={"x": {"not": {}}})], None, "not"),
        ([tool("f", properties={"x": {"$ref": "http://x/"}})], None, "parameters of f"),
        ([tool(f"f{i}", title="x" * 20_000) for i in range(4)], None, "offer fewer"),
    ],
)
def test_what_cannot_be_forced(
    tokenizer: Tokenizer, tools: list[Any], names: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tool_call_grammar(tokenizer, tools, ROWS, names=names)


def test_plain_tools_are_ordinary_messages() -> None:
    dialog = with_plain_tools(
        [
            {"role": "user", "content": "hi"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"name": "ping", "arguments": {"a": 1}}],
            },
            {"role": "tool", "content": "pong"},
        ],
        [PING],
        "Be brief.",
    )
    assert [message["role"] for message in dialog] == ["system", "user", "assistant", "user"]
    assert all(message.keys() == {"role", "content"} for message in dialog)
    assert dialog[0]["content"].startswith("Be brief.\n\n") and '"ping"' in dialog[0]["content"]
    [call] = parse_tool_calls(dialog[2]["content"]).tool_calls
    assert call == {"name": "ping", "arguments": {"a": 1}}
    assert dialog[3]["content"].endswith("pong")
    own = with_plain_tools([{"role": "system", "content": "S"}], [PING], "Be brief.")
    assert len(own) == 1 and own[0]["content"].startswith("S\n\n")
    assert with_plain_tools([{"role": "user", "content": "x"}], []) == [
        {"role": "user", "content": "x"}
    ]
