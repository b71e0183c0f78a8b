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
from llama.text.tool_parser import PYTHON_TAG, parse_tool_calls
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


def check_against_parser(tokenizer: Tokenizer, text: str, rng: random.Random) -> Reply:
    """The calls and the content are those of the whole text, in any pieces."""
    ids = random_ids(rng, tokenizer, text)
    whole = text.replace(TAG, PYTHON_TAG)
    reply = read(tokenizer, ids, rng)
    again = read(tokenizer, random_ids(rng, tokenizer, text), rng)
    assert (again.content, again.parsed) == (reply.content, reply.parsed)
    assert [(c["name"], c["arguments"]) for c in again.calls] == [
        (c["name"], c["arguments"]) for c in reply.calls
    ]
    expected = parse_tool_calls(whole)
    calls = [(call["name"], call["arguments"]) for call in expected.tool_calls]
    assert reply.parsed == calls, text
    assert (reply.content.strip() if calls else reply.content) == expected.content, text
    return reply


def test_random_calls(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for i in range(600):
        form, alphabet = rng.choice(TOOL_FORMS), rng.choice([PLAIN, HOSTILE])
        calls = [random_call(rng, alphabet) for _ in range(rng.choice([1, 1, 2, 3]))]
        between = rng.choice(["", ";", "; ", "\n", TAG]) if form != "python_list" else "\n"
        text = between.join(encode_tool_calls(calls, form))
        if PYTHON_TAG in text or (len(calls) > 1 and between == TAG and form == "function_tag"):
            continue
        text = text.replace("\ud800", "?")  # no ids decode to it
        code = len(calls) == 1 and is_code(calls[0])
        if code or rng.random() < 0.3:
            text = TAG + text
        if rng.random() < 0.2 and not code:
            text = f"```json\n{text}\n```"
        check_against_parser(tokenizer, text, rng)
