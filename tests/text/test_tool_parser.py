"""tool_parser.py on every form of call, on prose, and on hostile input."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest

from llama.text.tool_parser import MAX_LENGTH, ToolReply, parse_tool_calls
from llama.text.tool_prompt import TOOL_FORMS, ToolCall, encode_tool_call, encode_tool_calls


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "f", "parameters": {"a": 1}}', [("f", {"a": 1})]),
        ('{"type": "function", "name": "f", "parameters": {}}', [("f", {})]),
        ('{"name": "f", "arguments": null}', [("f", {})]),
        ('{"name": "f", "parameters": null}', [("f", {})]),
        ('{"type": "function", "function": {"name": "f", "arguments": "null"}}', [("f", {})]),
        ('{"name": "f", "arguments": {"a": [null]}}', [("f", {"a": [None]})]),
        (
            ' {"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}\n',
            [("f", {}), ("g", {})],
        ),
        (
            '{"name": "f", "parameters": {}}\n{"name": "g", "parameters": {}}',
            [("f", {}), ("g", {})],
        ),
        (
            '[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}]',
            [("f", {}), ("g", {})],
        ),
        ('<|python_tag|>{\n"name": "f",\n"parameters": {"a": "x"}}', [("f", {"a": "x"})]),
        (
            '<|python_tag|>{"name": "f", "parameters": {}}<|python_tag|>'
            '{"name": "g", "parameters": {}}',
            [("f", {}), ("g", {})],
        ),
        ('<|python_tag|>brave_search.call(query="a (b)")', [("brave_search", {"query": "a (b)"})]),
        ('photogen.call(query="x")', [("photogen", {"query": "x"})]),
        (
            "<|python_tag|>import os\nprint(1)\n",
            [("code_interpreter", {"code": "import os\nprint(1)\n"})],
        ),
        ("<|python_tag|>[f(x) for x in y]", [("code_interpreter", {"code": "[f(x) for x in y]"})]),
        ('<function=f>{"a": "it\'s"}</function>', [("f", {"a": "it's"})]),
        (
            '<function=f>{"a": {"b": "}"}}<function=g>{}</function>',
            [("f", {"a": {"b": "}"}}), ("g", {})],
        ),
        ("<|python_tag|><function=f>{}</function>", [("f", {})]),
        (
            "[f(a=1), g(b='x', c=[-1.5, {'k': None}], d=True,)]",
            [("f", {"a": 1}), ("g", {"b": "x", "c": [-1.5, {"k": None}], "d": True})],
        ),
        (
            '<|python_tag|>[get_weather(city="San Francisco", metric="celsius")]',
            [("get_weather", {"city": "San Francisco", "metric": "celsius"})],
        ),
        ("[f()]\n[g()]", [("f", {}), ("g", {})]),
        (
            '[f(a="""two\nlines""", b="\\d\\n\\x41\\u00e9")]',
            [("f", {"a": "two\nlines", "b": "\\d\nAé"})],
        ),
    ],
)
def test_forms(text: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    expected: list[ToolCall] = [{"name": name, "arguments": arguments} for name, arguments in calls]
    assert parse_tool_calls(text) == ToolReply("", expected)


STRING = r'"{\"a\": 1}"'
NESTED = '{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}'


@pytest.mark.parametrize(
    "text",
    [
        NESTED, NESTED.replace('{"a": 1}', STRING), f"[{NESTED}]", f"<|python_tag|>{NESTED}",
        '{"tool_calls": [' + NESTED + "]}",
        '{"tool_calls": [' + NESTED + '], "content": null}',
        '{"role": "assistant", "content": "", "tool_calls": [' + NESTED + "]}",
        '{"name": "f", "parameters": null, "arguments": {"a": 1}}', f"```json\n{NESTED}\n```",
        '{"id": "call_1", "type": "function", "function": {"name": "f", "parameters": {"a": 1}}}',
        '{"function": {"name": "f", "arguments": {"a": 1}}}',
        '{"type": "function", "function": "f", "parameters": {"a": 1}}',
        f'{{"name": "f", "arguments": {STRING}}}', f"<function=f>{STRING}</function>",
        r'{"name": "f", "parameters": "{\n\"a\": 1}\n"}',
        '{"name": "f", "description": "F.", "parameters": {"a": 1}}',
        '```json\n{"name": "f", "parameters": {"a": 1}}\n```', "```python\n[f(a=1)]\n```",
        '```\n[{"name": "f", "parameters": {"a": 1}}]```', "```tool_code\n[f(a=1)]",
        '``` {"name": "f", "parameters": {"a": 1}}\n',
        '```json{"name":"f","parameters":{"a":1}}```', '<|python_tag|>```\n[f(a=1)]\n```',
        '```\n<function=f>{"a": 1}</function>\n```', "```\n<|python_tag|>[f(a=1)]\n```",
        "{'name': 'f', 'parameters': {'a': 1}}", "[{'name': 'f', 'arguments': {'a': 1,},}]",
    ],
)  # fmt: skip
def test_calls_as_models_write_them(text: str) -> None:
    assert parse_tool_calls(text) == ToolReply("", [{"name": "f", "arguments": {"a": 1}}])


def test_several_calls_in_fences() -> None:
    calls: list[ToolCall] = [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]
    for one, two in (
        ('{"name": "f", "parameters": {}}', '{"name": "g", "parameters": {}}'),
        ("[f()]", "[g()]"),
    ):
        for between in ("\n", "\n```\n```json\n", "\n```\n\n```\n"):
            assert parse_tool_calls(f"```\n{one}{between}{two}\n```").tool_calls == calls
    [call] = parse_tool_calls('```\nbrave_search.call(query="a ``` b")\n```').tool_calls
    assert call == {"name": "brave_search", "arguments": {"query": "a ``` b"}}


def test_constants_of_json_and_of_python() -> None:
    expected = {"a": True, "b": [False, None], "c": {"true": "null"}}
    for text in (
        '[f(a=true, b=[false, null], c={"true": "null"})]',
        "[f(a=True, b=[false, None], c={'true': 'null'})]",
        '{"name": "f", "parameters": {"a": True, "b": [False, None], "c": {"true": "null"}}}',
    ):
        assert parse_tool_calls(text).tool_calls == [{"name": "f", "arguments": expected}]
    [call] = parse_tool_calls(r'[f(a="\ud83d\ude00", true=1)]').tool_calls
    assert call["arguments"] == {"a": "😀", "true": 1}


def test_dotted_names() -> None:
    text = '[weather.get(city="x"), a.b.c(), brave_search.call(query="y")]'
    expected: list[ToolCall] = [
        {"name": "weather.get", "arguments": {"city": "x"}},
        {"name": "a.b.c", "arguments": {}},
        {"name": "brave_search", "arguments": {"query": "y"}},
    ]
    assert parse_tool_calls(text).tool_calls == expected
    for form in TOOL_FORMS:
        written = "".join(encode_tool_calls(expected, form))
        assert parse_tool_calls(written).tool_calls == expected
    assert encode_tool_call(expected[0], "python_list") == '[weather.get(city="x")]'
    assert (
        parse_tool_calls("<function=weather.get></function>").tool_calls[0]["name"] == "weather.get"
    )


@pytest.mark.filterwarnings("error")
def test_unknown_escapes_are_kept_without_a_warning() -> None:
    reply = parse_tool_calls(r'[f(a="\d\\d\q")]')
    assert reply.tool_calls == [{"name": "f", "arguments": {"a": r"\d\d\q"}}]


def test_text_beside_calls() -> None:
    reply = parse_tool_calls('I look it up. <function=f>{"a": 1}</function> Wait.')
    assert (reply.content, len(reply.tool_calls)) == ("I look it up.  Wait.", 1)
    reply = parse_tool_calls('One moment.\n<|python_tag|>brave_search.call(query="x")')
    assert (reply.content, len(reply.tool_calls)) == ("One moment.", 1)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "Hello.", "[1] See the notes (below).", "[a list](http://x.org) of things",
        "[1, 2, 3]",
        '{"city": "Paris"}', '{"name": "Bob", "age": 3}', '[{"name": "Bob"}]', "{x | x > 0}",
        "{}", "[]",
        '{"name": "Bob"} is the JSON.', 'Write {"name": "f", "parameters": {}} to call f.',
        "Use brave_search.call(query=...) for that.", "def f(x):\n    return [g(x)]",
        "[Foo(bar) baz]",
        '```json\n{"city": "Paris"}\n```', "```python\n[f(x) for x in y]\n```", "```", "``````",
        '```json\n{"name": "f", "parameters": {}}\n```\nThis calls f.', "```\n[g(x)]\n```",
        '```json\n{"name": "f", "parameters": {}}\n```\nor\n```\n[g()]\n```',
        'Write:\n```json\n{"name": "f", "parameters": {}}\n```', "['a', None]", "{'a': 1}",
        '{"tool_calls": []}', '{"function": {"x": 1}}', '{"function": "sin", "parameters": {}}',
        "f(a=1)", "[[f(a=1)]]", "[f] (a=1)", "[" * 5000, "null", '"text"', "</function>",
    ],
)  # fmt: skip
def test_prose_has_no_calls(text: str) -> None:
    assert parse_tool_calls(text) == ToolReply(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"name": "f", "parameters": {"a": 1', "broken JSON"),
        ('<|python_tag|>{"nam', "broken JSON"),
        ('<|python_tag|>{"a": 1}', "with a name"),
        ("<|python_tag|> ", "nothing follows"),
        ('{"name": "f", "parameters": "x"}', 'the "parameters" of f'),
        ('{"name": "f", "parameters": 3}', 'the "parameters" of f'),
        ('{"type": "function", "name": "f"}', 'the "parameters" of f'),
        ('{"name": 3, "parameters": {}}', "with a name"),
        ('{"name": "f", "parameters": {}} I hope this helps', "broken JSON"),
        ('[{"name": "f", "parameters": {}}, 1]', "a call in JSON"),
        ('{"name": "f", "parameters": {"a": NaN}}', "NaN is not a JSON number"),
        ('{"name": "f", "parameters": {"a": 1e999}}', "inf is not a JSON number"),
        ('{"name": "f", "parameters": {"a": 1, "a": 2}}', "given twice"),
        ('{"name": "f", "parameters": {"a": ' + "9" * 1000 + "}}", "600 digits"),
        ('{"name": "f", "parameters": {"a": ' + "9" * 10000 + "}}", "broken JSON"),
        ('{"name": "__import__", "parameters": {}}', "not a tool's name"),
        ('{"name": "os.__dict__", "parameters": {}}', "not a tool's name"),
        ('{"name": "f", "parameters": {"__class__": 1}}', "not the name of an argument"),
        ('{"name": "", "parameters": {}}', "not a tool's name"),
        ("<function=f>{", "broken JSON"),
        ("<function=f", "a function call is"),
        ("<function=f>3</function>", 'the "parameters" of f'),
        ('<function=f>{"a": ' + "[" * 100000, "nested"),
        ("<function=f g>{}</function>", "a function call is"),
        ('brave_search.call(query="x', "a built-in call is"),
        ('brave_search.call(q="x")', "a built-in call is"),
        ('<|python_tag|>brave_search.call(query=open("x"))', "a built-in call is"),
        ("[f(a=1", "broken list"),
        ('[f("water", True)]', "broken list"),
        ("[f(x)]", "broken list"),
        ("[f(*x)]", "broken list"),
        ("[f(**{'a': 1})]", "broken list"),
        ("[f(a=g())]", "not a literal"),
        ("[f(a=b)]", "not a literal"),
        ("[f(a={1, 2})]", "broken list"),
        ("[f(a={1: 2})]", "broken list"),
        ("[f(a=(1, 2))]", "not a literal"),
        ("[f(a=b'x')]", "not a literal"),
        ("[f(a=f'{x}')]", "not a literal"),
        ("[f(a=1 + 1)]", "broken list"),
        ("[f(a=1e999)]", "inf is not a JSON number"),
        ("[f(a=" + "9" * 10000 + ")]", "not a literal"),
        ("[f(a='\\x4')]", "not a literal"),
        ("[f(a=1, a=2)]", "given twice"),
        ("[f(a={'k': 1, 'k': 2})]", "given twice"),
        ("[f(a=1), 42]", "broken list"),
        ("[os.__dict__(a=1)]", "not a tool's name"),
        ("[f(a.b=1)]", "not the name of an argument"),
        ("[f.(a=1)]", "broken list"),
        ('{"name": "f", "arguments": "{\\"a\\": 1"}', 'the "parameters" of f'),
        ('{"name": "f", "arguments": "{} and"}', "text follows"),
        ('{"name": "f", "arguments": "[1]"}', 'the "parameters" of f'),
        ('{"name": "f", "arguments": "{\\"a\\": 1, \\"a\\": 2}"}', "given twice"),
        ('{"name": "f", "arguments": "{\\"a\\":' + "[" * 1000 + '"}', "nested"),
        ('{"type": "function", "function": {"name": 3, "arguments": {}}}', "with a name"),
        ('{"type": "function", "function": {"name": "f"}}', 'the "parameters" of f'),
        ('{"name": "f", "parameters": {"a": True', "broken JSON"),
        ('```json\n{"name": "f", "parameters": {"a": 1', "broken JSON"),
        ("```\n[f(a=1), g(\n```", "broken list"),
        ("[__import__(name='os')]", "not a tool's name"),
        ("[f(__class__=1)]", "not the name of an argument"),
        ("[f(a=1)] and more", "broken list"),
        ("[f(a='\0')]", "not a literal"),
        ("x" * (MAX_LENGTH + 1), "not parsed"),
    ],
)
def test_broken_calls_are_text_with_a_problem(text: str, problem: str) -> None:
    reply = parse_tool_calls(text)
    assert (reply.content, reply.tool_calls) == (text, [])
    assert reply.problem and problem in reply.problem, reply.problem


DEEP = [
    "[f(a=" + "[" * 100_000, "[f(a=" + "-" * 200_000 + "1)]", "[f(a=" + "not " * 50_000 + "1)]",
    "[f(a=" + "1+" * 100_000 + "1)]", "[f(a=x" + ".y" * 100_000 + ")]",
    "[f(a=x" + "()" * 100_000 + ")]",
    "[f(a=" + "{'k':" * 50_000, "[f(a=" + "lambda:" * 40_000 + "1)]", "[f(a='" + "\\" * 400_000,
    '{"name": "f", "parameters": ' + '{"a":' * 90_000,
    '{"name": "f", "parameters": {"a": ' + "[" * 400_000,
    '{"name": "f", "parameters": {"a": ' + "[" * 40 + "]" * 40 + "}}",
    "<function=f>" + '{"a":' * 90_000, "<function=" * 40_000, "<|python_tag|>" * 30_000,
    '{"name": "f", "parameters": {"a": "' + '\\"' * 200_000, '[{"name":' * 50_000,
    "<function=f>{}</function>" + "]" * 90_000 + '<function=f>{"a":' + "[" * 90_000,
    '<function=f>{}</function> " <function=f>{"a":' + "[" * 90_000,
    '{"name": "f", "parameters": {}}' * 9_000 + "[" * 90_000,
    "[1" + ",1" * 200_000 + "]" * 2 + "[" * 9_000,
    "[f(a=1)" + ",f(a=1)" * 50_000 + ",]x", 'brave_search.call(query="' + "\\" * 400_000,
    "```" * 130_000, "```\n{" + "'a': {" * 60_000,
    '{"name": "f", "parameters": {}}' + "```" * 90_000 + "x",
    "[f" + ".f" * 200_000, "{'name': '" + "\\'" * 200_000,
    "[f" + " " * 400_000, "{" + " " * 400_000, "[f(" + " " * 400_000 + "x",
]  # fmt: skip


def test_deep_and_long_input_on_a_small_stack() -> None:
    """With 512 KB, as a server's thread may have, `ast.parse` crashes on some of these."""
    replies: list[ToolReply] = []
    before = threading.stack_size(512 * 1024)
    try:
        thread = threading.Thread(target=lambda: replies.extend(map(parse_tool_calls, DEEP)))
        thread.start()
        thread.join(60)
    finally:
        threading.stack_size(before)
    assert [reply.content for reply in replies] == DEEP
    assert not any(reply.tool_calls for reply in replies)
    assert sum(reply.problem is not None for reply in replies) >= len(DEEP) - 8


def test_nothing_is_evaluated(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "created"
    create = f"open({str(path)!r}, 'w')"
    for payload in (create, f"__import__('os').mkdir({str(path)!r})", f"[{create} for _ in [1]]"):
        for text in (
            f"[f(a={payload})]", f"[{payload}]", payload, f"<|python_tag|>{payload}",
            f"<function=f>{payload}</function>", f'{{"name": "f", "parameters": {payload}}}',
            f"brave_search.call(query={payload})", f"[f(a=f'{{{payload}}}')]", f"[f(**{payload})]",
        ):  # fmt: skip
            reply = parse_tool_calls(text)
            assert all(call["name"] == "code_interpreter" for call in reply.tool_calls)
    assert not path.exists() and not recwarn.list


def test_random_answers_never_raise() -> None:
    rng = random.Random(7)
    parts = [
        "[", "]", "{", "}", "(", ")", '"', "'", "\\", ",", ":", "=", "f", "f(", "a=", "1", "-",
        "name",
        '"name":', '"parameters":', '{"name":"f","parameters":{', "<function=", "f>", "</function>",
        "<|python_tag|>", "brave_search.call(query=", "\n", " ", "\0", "\ud800", "None", "NaN", "é",
    ]  # fmt: skip
    for _ in range(20_000):
        text = "".join(rng.choices(parts, k=rng.randint(0, 14)))
        reply = parse_tool_calls(text)
        if reply.tool_calls:
            for form in TOOL_FORMS:
                again = parse_tool_calls("".join(encode_tool_calls(reply.tool_calls, form)))
                if reply.tool_calls[0]["name"] != "code_interpreter":
                    assert again.tool_calls == reply.tool_calls
        else:
            assert reply.content == text


def test_argument_that_is_no_message() -> None:
    for wrong in (None, 3, {"content": None}):
        with pytest.raises(TypeError, match="a message or its text"):
            parse_tool_calls(wrong)  # type: ignore[arg-type]


def test_a_definition_is_not_a_call() -> None:
    """Some models answer with the JSON of a tool definition."""
    schema = '{"type": "object", "properties": {"a": {"type": "string"}}}'
    described = f'{{"name": "f", "description": "F", "parameters": {schema}}}'
    for text in (
        described,
        f'{{"type": "function", "function": {described}}}',
        f'{{"type": "function", "function": {{"name": "f", "parameters": {schema}}}}}',
        '[{"type": "function", "function": {"name": "f", "description": "F", "parameters": {}}}]',
    ):
        reply = parse_tool_calls(text)
        assert reply.content == text and not reply.tool_calls
        assert "a definition of f, not a call" in (reply.problem or "")
    call: ToolCall = {"name": "f", "arguments": {"type": "object", "properties": {}}}
    assert parse_tool_calls(encode_tool_call(call)).tool_calls == [call]


def test_backslashes_take_linear_time() -> None:
    text = 'brave_search.call(query="' + "\\" * 400_000 + 'x")'
    [call] = parse_tool_calls(text).tool_calls
    assert len(encode_tool_call(call)) >= 400_000
