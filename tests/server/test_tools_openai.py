"""Tools as the official client sees them: forced, free, streamed, and results that come back."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import jsonschema
import openai
import pytest
import torch
from pydantic import BaseModel

from llama import Llama
from llama.text.tool_parser import PYTHON_TAG
from llama.text.tool_prompt import TOOL_FORMS
from tests.server.folding import ask
from tests.server.running import NAME, RunningServer
from tests.server.test_tool_stream import TAG, random_ids
from tests.test_layers import ROOT

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"enum": [1, 2]}},
    "required": ["city"],
    "additionalProperties": False,
}
Say = Callable[[str], None]


def tool(name: str) -> dict[str, Any]:
    function = {"name": name, "description": "", "parameters": SCHEMA}
    return {"type": "function", "function": function}


def chat(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "How is the weather?"}]
    common = {"model": NAME, "messages": messages, "tools": [tool("f"), tool("g")], "seed": 1}
    return common | {"max_completion_tokens": 80, "extra_body": {"top_k": 50}} | fields


class Script:
    """Lets a model write given ids and nothing else."""

    def __init__(self, ids: Sequence[int]):
        self.ids = list(ids)

    def start(self) -> ScriptState:
        return ScriptState(self.ids)


class ScriptState:
    def __init__(self, ids: Sequence[int]):
        self.ids, self.at = ids, 0

    def allowed(self) -> torch.Tensor:
        mask = torch.zeros(max(self.ids) + 1, dtype=torch.bool)
        mask[self.ids[self.at]] = True
        return mask

    def accept(self, token: int) -> None:
        assert token == self.ids[self.at]
        self.at += 1


@pytest.fixture
def say(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> Say:
    """`say(text)`: from now on the model answers so, `TAG` by its id; no request is forced."""

    def set_text(text: str) -> None:
        ids = random_ids(random.Random(0), tiny_llama.tokenizer, text)
        script = Script([*ids, tiny_llama.tokenizer.eot_id])
        monkeypatch.setattr("llama.server.app.constraint", lambda llama, body: script)

    return set_text


def both(client: openai.OpenAI, request: dict[str, Any]) -> dict[str, Any]:
    """The choice of a reply, which is the same from a stream."""
    whole = ask(client, request, stream=False)
    assert ask(client, request, stream=True) == whole
    choices: list[dict[str, Any]] = whole["choices"]
    assert len(choices) == 1
    return choices[0]


@pytest.mark.parametrize("form", TOOL_FORMS)
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "g"}}], ids=["any", "named"]
)
def test_forced(client: openai.OpenAI, form: str, choice: Any) -> None:
    more = {"top_k": 50, "tool_form": form}
    request = chat(tool_choice=choice, parallel_tool_calls=False, extra_body=more)
    reply = client.chat.completions.create(**request)
    assert reply.choices[0].finish_reason == "tool_calls"
    assert reply.choices[0].message.content is None
    [call] = reply.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name in ("f", "g") if choice == "required" else call.function.name == "g"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    both(client, request)


def test_forced_of_the_demo_model(demo_client: openai.OpenAI) -> None:
    """ChatML has no tools; a grammar makes the model call one."""
    request = chat(tool_choice="required", parallel_tool_calls=False, tools=[tool("f")])
    found = both(demo_client, request)
    [(name, arguments)] = found["calls"]
    assert (name, found["text"], found["finish_reason"]) == ("f", "", "tool_calls")
    jsonschema.validate(json.loads(arguments), SCHEMA)


def test_none(client: openai.OpenAI, say: Say) -> None:
    """The prompt has no tools, and a call is text."""
    text = '{"name": "f", "parameters": {}}'
    say(text)
    with_tools = ask(client, chat(tool_choice="none"), stream=False)
    without = ask(client, {k: v for k, v in chat().items() if k != "tools"}, stream=False)
    assert with_tools == without
    assert without["choices"][0]["text"] == text


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("It rains.", "It rains.", []),
        ('{"name": "f", "parameters": {"city": "Bern"}}', "", [("f", {"city": "Bern"})]),
        ('[f(city="A"), g(city="😀")]', "", [("f", {"city": "A"}), ("g", {"city": "😀"})]),
        ('Wait.\n<function=g>{"a": 1}</function>', "Wait.", [("g", {"a": 1})]),
        (f'Wait.{TAG}{{"name": "f", "parameters": {{}}}}', "Wait.", [("f", {})]),
        (f'Say {PYTHON_TAG}{{"name": "f", "parameters": {{}}}}', None, []),
        ('{"name": "unknown", "parameters": {}}', None, []),
        ('{"name": "f", "parameters": ', None, []),
        ('[f(city="A", oh)]', None, []),
        ('```json\n{"name": "f", "parameters": {}}\n```\nThis calls f.', None, []),
    ],
)
def test_auto(
    client: openai.OpenAI, say: Say, text: str, content: str | None, calls: list[Any]
) -> None:
    say(text)
    found = both(client, chat(logprobs=True))
    assert [(name, json.loads(arguments)) for name, arguments in found["calls"]] == calls
    assert found["text"] == (text if content is None else content)
    assert found["finish_reason"] == ("tool_calls" if calls else "stop")
    data = bytes(b for _, _, bytes_, *_ in found["logprobs"] for b in bytes_)
    assert data.decode() == text.replace(TAG, PYTHON_TAG)


def test_code(client: openai.OpenAI, say: Say) -> None:
    """Code after the tag is a call of code_interpreter, where that is offered."""
    say(f"{TAG}print(1)\n")
    assert both(client, chat())["text"] == f"{PYTHON_TAG}print(1)\n"


def test_one_call_only(client: openai.OpenAI, say: Say) -> None:
    say('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}')
    assert len(both(client, chat())["calls"]) == 2
    assert both(client, chat(parallel_tool_calls=False))["calls"] == [("f", "{}")]


def test_cut_by_length(client: openai.OpenAI) -> None:
    found = both(client, chat(tool_choice="required", max_completion_tokens=18))
    assert found["finish_reason"] == "length"


class Weather(BaseModel):
    """The weather of a city."""

    city: str
    days: int


def test_helpers_of_the_client(client: openai.OpenAI, say: Say) -> None:
    """`parse` and `stream` give objects of pydantic."""
    request = chat(tools=[openai.pydantic_function_tool(Weather)])
    say('{"name": "Weather", "parameters": {"city": "Bern", "days": 3}}')
    parsed = client.chat.completions.parse(**request)
    with client.chat.completions.stream(**request) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    for message in (parsed.choices[0].message, final.choices[0].message):
        [call] = message.tool_calls or []
        assert call.function.parsed_arguments == Weather(city="Bern", days=3)
    parts = [e for e in events if e.type == "tool_calls.function.arguments.delta"]
    assert len(parts) > 3, "arguments come as they are written"
    assert "".join(e.arguments_delta for e in parts) == '{"city":"Bern","days":3}'


def test_results_come_back(client: openai.OpenAI) -> None:
    """The client's own message with calls, then their results in any order."""
    offered = [tool("f")]
    asked = chat(tool_choice="required", parallel_tool_calls=False, tools=offered)
    message = client.chat.completions.create(**asked).choices[0].message
    assert message.tool_calls
    message.tool_calls.append(message.tool_calls[0].model_copy(update={"id": "call_2"}))
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": f"Sun {i}"}
        for i, call in enumerate(message.tool_calls)
    ]
    dialog = [*asked["messages"], message, *reversed(results)]
    answer = client.chat.completions.create(
        **chat(messages=dialog, tools=offered, max_completion_tokens=5)
    )
    assert answer.usage is not None and answer.usage.completion_tokens <= 5
    wrong: Any = [*asked["messages"], message, {"role": "tool", "tool_call_id": "x", "content": ""}]
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**chat(messages=wrong))
    assert error.value.param == f"messages[{len(wrong) - 1}].tool_call_id"


def test_example_of_the_docs(
    demo_server: RunningServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs as it stands, also with ChatML: calls and results are text there."""
    page = (ROOT / "docs" / "server.md").read_text("utf-8")
    example = page.partition("## Tools\n")[2].partition("```python\n")[2].partition("```")[0]
    assert "tool_call_id" in example
    exec(example.replace("http://127.0.0.1:8000", demo_server.url), {"__name__": "example"})
    assert capsys.readouterr().out.strip()


def test_ids_of_calls_are_unique(client: openai.OpenAI, say: Say) -> None:
    say("[f(), g(), f()]")
    reply = client.chat.completions.create(**chat(n=3))
    ids = [call.id for choice in reply.choices for call in choice.message.tool_calls or []]
    assert len(set(ids)) == len(ids) == 9


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "h"}}}, "tool_choice"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool("f"), tool("f")]}, "tools"),
        ({"tools": [tool("no name")]}, "tools[0].function"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"parallel_tool_calls": "yes"}, "parallel_tool_calls"),
    ],
)
def test_mistakes(client: openai.OpenAI, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**chat(**fields))
    assert error.value.param == param
