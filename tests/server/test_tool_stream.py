"""tool_stream.py against `parse_tool_calls` of the whole answer, at random splits."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llama.engine.request import FinishReason
from llama.server.tool_stream import ToolStream
from llama.text.detokenizer import Detokenizer
from llama.text.tool_parser import PYTHON_TAG, ToolReply, parse_tool_calls
from llama.text.tool_prompt import BUILTIN_TOOLS, TOOL_FORMS, encode_tool_calls, is_code
from llama.tokenizer import Tokenizer
from tests.text.tool_calls import HOSTILE, PLAIN, random_call

NAMES = {"f", "g", "get_weather", "Tool2", "weather.get", *BUILTIN_TOOLS}
# Written by the model as this id, not as text.
TAG = "\x1a"


@pytest.fixture(scope="module")
def tokenizer(llama3_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(llama3_tokenizer_path, "llama3.1")


def random_ids(rng: random.Random, tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text, seldom the shortest ones."""
    ids: list[int] = []
    for i, part in enumerate(text.split(TAG)):
        if i:
            ids.append(tokenizer.special_tokens[PYTHON_TAG])
        while part:
            n = rng.choice([1, 3, 10, len(part)])
            ids += tokenizer.encode(part[:n], bos=False)
            part = part[n:]
    return ids


class Reply:
    """What the deltas of an answer add up to, as a client does it."""

    def __init__(self, deltas: Sequence[dict[str, Any]], called: int):
        self.content, self.called = "", called
        self.calls: list[dict[str, Any]] = []
        for delta in deltas:
            assert len(delta) == 1
            self.content += delta.get("content", "")
            for part in delta.get("tool_calls", ()):
                if part["index"] == len(self.calls):
                    assert part["type"] == "function" and part["function"]["arguments"] == ""
                    self.calls.append({"id": part["id"], **part["function"]})
                else:
                    assert part["index"] == len(self.calls) - 1
                    assert part.keys() == {"index", "function"}
                    assert part["function"].keys() == {"arguments"}
                    self.calls[-1]["arguments"] += part["function"]["arguments"]
        assert len({call["id"] for call in self.calls}) == len(self.calls)

    @property
    def parsed(self) -> list[tuple[str, Any]]:
        """Names and arguments of the complete calls."""
        found = []
        for call in self.calls:
            try:
                found.append((call["name"], json.loads(call["arguments"])))
            except ValueError:
                continue
        assert len(found) == self.called
        return found


def read(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    rng: random.Random | None = None,
    *,
    stop: Sequence[str] = (),
    reason: FinishReason = "stop",
    **options: Any,
) -> Reply:
    """Feed the ids in random pieces, or all at once."""
    stream = ToolStream(tokenizer, **({"names": NAMES} | options))
    detokenizer = Detokenizer(tokenizer.decode_bytes, stop)
    deltas, at = [], 0
    while True:
        n = rng.choice([1, 1, 2, 7]) if rng else len(ids)
        last = at + n >= len(ids)
        text = detokenizer.feed(ids[at : at + n], last)
        last = last or detokenizer.stopped
        deltas += stream.feed(ids[at : at + n], text, reason if last else None)
        if last:
            return Reply(deltas, stream.called)
        at += n


def check_splits(
    tokenizer: Tokenizer, text: str, rng: random.Random, **options: Any
) -> tuple[Reply, ToolReply]:
    """The reply to an answer, the same in any pieces and by other ids; what the parser reads."""
    reply = read(tokenizer, random_ids(rng, tokenizer, text), rng, **options)
    again = read(tokenizer, random_ids(rng, tokenizer, text), rng, **options)
    assert again.content == reply.content
    assert [call | {"id": ""} for call in again.calls] == [
        call | {"id": ""} for call in reply.calls
    ]
    # Ordinary text that looks like a tag has another length of the same kind for the parser.
    other = text.replace(PYTHON_TAG, "<|python-tag|>").replace(TAG, PYTHON_TAG)
    expected = parse_tool_calls(other)
    restored = json.dumps(expected.tool_calls).replace("<|python-tag|>", PYTHON_TAG)
    return reply, ToolReply(
        expected.content.replace("<|python-tag|>", PYTHON_TAG),
        json.loads(restored),
        expected.problem,
    )


def check_against_parser(tokenizer: Tokenizer, text: str, rng: random.Random) -> None:
    """The calls and the content are those of the whole text."""
    reply, expected = check_splits(tokenizer, text, rng)
    calls = [(call["name"], call["arguments"]) for call in expected.tool_calls]
    if expected.problem and reply.parsed:
        return  # complete calls before a broken one stay calls
    assert reply.parsed == calls, text
    assert (reply.content.strip() if calls else reply.content) == expected.content, text


def test_random_calls(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(600):
        form, alphabet = rng.choice(TOOL_FORMS), rng.choice([PLAIN, HOSTILE])
        calls = [random_call(rng, alphabet) for _ in range(rng.choice([1, 1, 2, 3]))]
        between = rng.choice(["", ";", "; ", "\n", TAG if form == "json" else ""])
        text = between.join(encode_tool_calls(calls, form)).replace("\ud800", "?")
        code = len(calls) == 1 and is_code(calls[0])
        if code or rng.random() < 0.3:
            text = TAG + text
        if rng.random() < 0.2 and not code:
            text = f"```json\n{text}\n```"
        check_against_parser(tokenizer, text, rng)


FRAGMENTS = [
    TAG, PYTHON_TAG, "<function=f>", "<function=", "</function>", '{"a": 1}', "{}", "[", "]", "{",
    "}", ", ", "; ", "\n", " ", "```", "```json\n", "\n```", "Hello", "Look.", "[f(a=1)]", "[f(",
    ")]", '"', "'", ": ", '"{}"', "😀", "NaN", "1e999", "True", "print(1)", "brave_search",
    'brave_search.call(query="x")', '{"b": "\\d"}', '{"c": True,}',
    "{'name': 'f', 'parameters': {}}",
    '{"name": "f", "parameters": ', '{"name": "f", "parameters": {}}', '{"name": "f", "par',
    '{"type": "function", "name": "g", "parameters": {"a": [1, {}]}}',
    '{"type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}',
    '{"name": "f", "arguments": {"__a": 1}}', '{"parameters": {"b": 2}, "name": "g"}',
]  # fmt: skip


def test_random_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices(FRAGMENTS, k=rng.randint(1, 7)))
        check_against_parser(tokenizer, text, rng)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f'{PYTHON_TAG}{{"name": "f", "parameters": {{}}}}', None, []),  # spelled, no tag
        (f"{PYTHON_TAG}print(1)", None, []),
        (f'{TAG}{{"name": "f", "parameters": {{}}}}', "", [("f", "{}")]),
        (f"Look:\n{TAG}print(1)", "Look:", [("code_interpreter", '{"code":"print(1)"}')]),
        (
            f'{{"name": "f", "parameters": {{"a": "{PYTHON_TAG}"}}}}',
            "",
            [("f", f'{{"a":"{PYTHON_TAG}"}}')],
        ),
        ('{"name": "unknown", "parameters": {}}', None, []),
        ("[f(a=1), unknown()]", None, []),
        ("<function=unknown>{}</function> Hm.", None, []),
        (
            '{"name": "f", "parameters": {}}; {"name": "unknown", "parameters": {}}',
            '{"name": "unknown", "parameters": {}}',
            [("f", "{}")],
        ),
        # The arguments of a broken call never become complete.
        ('{"name": "f", "parameters": {"a": 1}} I hope this helps.', None, [("f", '{"a":1')]),
        ('{"name": "f", "parameters": {"a": 1, "b": oh}}', None, [("f", '{"a":1,"b":')]),
        ('{"name": "f", "parameters": {"a": "x', None, [("f", '{"a":"x')]),
        ('{"name": "f", "parameters": {"a": 1}, "id": "x"}', "", [("f", '{"a":1}')]),
        (
            '{"name": "f", "arguments": {"a": 1}, "parameters": {"b": 2}}',
            None,
            [("f", '{"a":1')],
        ),
        ('<function=f>{"a": 1, "a": 2}', None, [("f", '{"a":1,"a"')]),
    ],
)
def test_what_is_a_call(
    tokenizer: Tokenizer, text: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    reply, _ = check_splits(tokenizer, text, random.Random(0))
    assert reply.content == (text.replace(TAG, PYTHON_TAG) if content is None else content)
    assert [(call["name"], call["arguments"]) for call in reply.calls] == calls


def test_code_without_an_interpreter_is_content(tokenizer: Tokenizer) -> None:
    reply, _ = check_splits(tokenizer, f"{TAG}print(1)", random.Random(0), names={"f"})
    assert (reply.content, reply.calls) == (f"{PYTHON_TAG}print(1)", [])


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}',
        '[{"name": "f", "parameters": {}}, {"name": "g", "parameters": {}}]',
        "[f(), g()]",
        "<function=f>{}</function><function=g>{}</function>",
        '<function=f>{}</function> and <function=g>"{}"',
    ],
)
def test_at_most_one_call(tokenizer: Tokenizer, text: str) -> None:
    rng = random.Random(0)
    reply, expected = check_splits(tokenizer, text, rng, parallel=False)
    assert (reply.parsed, reply.content) == ([("f", {})], "")
    assert len(expected.tool_calls) == 2
    assert len(check_splits(tokenizer, text, rng)[0].parsed) == 2


@pytest.mark.parametrize("head", ['{"name": "f", "parameters": ', "<function=f>"])
def test_cut_by_length(tokenizer: Tokenizer, head: str) -> None:
    """What was sent is all there is: no content, and no complete call."""
    text = head + '{"a": [1, "xyz'
    reply, _ = check_splits(tokenizer, text, random.Random(0), reason="length")
    assert reply.content == ""
    assert [call["arguments"] for call in reply.calls] == ['{"a":[1,"xyz']


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ('{"name": "f", "parameters": {}}', '; {"name": "g", "par'),
        ('[{"name": "f", "parameters": {}}', ', {"name'),
        ("<function=f>{}</function>", "<function=g"),
        ("<function=f>{}", "</func"),
    ],
)
def test_second_call_cut_by_length(tokenizer: Tokenizer, first: str, second: str) -> None:
    reply, _ = check_splits(tokenizer, first + second, random.Random(0), reason="length")
    assert (reply.content, reply.parsed) == ("", [("f", {})])


def test_stop_string_inside_a_tag_and_a_call(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    text = f'Yes. {TAG}{{"name": "f", "parameters": {{"a": 1}}}}'
    for stop, content, calls in (
        ("python", "Yes. <|", []),
        ("es", "Y", []),
        ('"a"', f'Yes.{" " + PYTHON_TAG}{{"name": "f", "parameters": {{', []),
        ("never", "Yes.", ['{"a":1}']),
    ):
        reply, _ = check_splits(tokenizer, text, rng, stop=[stop])
        assert (reply.content, [call["arguments"] for call in reply.calls]) == (content, calls)


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ('{"name": "f", "parameters": {"a": "' + "word " * 50 + '"}}', 35),
        ('[{"type": "function", "name": "f", "parameters": {"a": "' + "word " * 50 + '"}}]', 55),
        ("<function=f>" + '{"a": "' + "word " * 50 + '"}', 20),
        (TAG + "print(1)\n" * 30, 2),
        ("Hello " * 50, 7),
        ("```python\n" + "print(1)\n" * 30, 12),
        ("[see](the link) " * 20, 6),
        ('{"city": "Paris"}' + " is JSON" * 30, 18),
    ],
)
def test_nothing_is_held_longer_than_needed(tokenizer: Tokenizer, text: str, held: int) -> None:
    """Each character comes out before `held` more are known."""
    stream = ToolStream(tokenizer, NAMES)
    sent = 0
    for received, part in enumerate(text):
        ids = random_ids(random.Random(0), tokenizer, part)
        for delta in stream.feed(ids, part.replace(TAG, PYTHON_TAG)):
            for call in delta.get("tool_calls", ()):
                sent += len(call["function"]["arguments"].encode())
            sent += len(delta.get("content", ""))
        assert sent > received - held - 20, (received, sent)
    assert sent > 200
