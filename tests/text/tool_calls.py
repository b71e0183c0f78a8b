"""Random tool calls for tests."""

from __future__ import annotations

import random
import string
from typing import Any

from llama.text.tool_prompt import ToolCall

PLAIN = string.ascii_letters + string.digits + " .,;:!?'()[]{}<>|/=äß漢😀"
HOSTILE = PLAIN + '"\\\n\t\r\0\x7f\u2028\ud800'
PIECES = ["<|python_tag|>", "</function>", '")', "')", '\\"', "<function=x>", "[f(a=1)]", "}{"]


def random_text(rng: random.Random, alphabet: str) -> str:
    text = "".join(rng.choices(alphabet, k=rng.randint(0, 12)))
    return text + rng.choice(PIECES) if alphabet is HOSTILE and rng.random() < 0.3 else text


def random_value(rng: random.Random, alphabet: str, depth: int = 0) -> Any:
    kind = rng.randrange(5 if depth == 3 else 7)
    if kind == 5:
        return [random_value(rng, alphabet, depth + 1) for _ in range(rng.randint(0, 3))]
    if kind == 6:
        return {
            random_text(rng, alphabet): random_value(rng, alphabet, depth + 1)
            for _ in range(rng.randint(0, 3))
        }
    choices: list[Any] = [
        rng.randint(-(10**20), 10**20), rng.uniform(-1e30, 1e30), rng.random() < 0.5, None,
        random_text(rng, alphabet),
    ]  # fmt: skip
    return choices[kind]


def random_call(rng: random.Random, alphabet: str, builtin: bool = True) -> ToolCall:
    kind = rng.randrange(6) if builtin else 5
    text = random_text(rng, alphabet)
    if kind < 3:
        name = ("brave_search", "wolfram_alpha", "photogen")[kind]
        return {"name": name, "arguments": {"query": text}}
    if kind == 3:
        return {"name": "code_interpreter", "arguments": {"code": f"x = {text}"}}
    keys = rng.sample(["a", "city", "n_best", "query", "_x", "B2"], rng.randint(0, 4))
    return {
        "name": rng.choice(["f", "get_weather", "Tool2"]),
        "arguments": {key: random_value(rng, alphabet) for key in keys},
    }


def to_meta(call: ToolCall) -> Any:
    from llama_models.datatypes import ToolCall as MetaToolCall

    # Meta's class rejects nested lists, though its code can write them.
    meta_call = MetaToolCall(call_id="c", tool_name=call["name"], arguments={})
    return meta_call.model_copy(update={"arguments": call["arguments"]})


def has_dict(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(isinstance(v, dict) or has_dict(v) for v in values)


def random_plain_call(rng: random.Random, form: str) -> ToolCall:
    """A call that Meta's code writes correctly: no quotes, and no dicts in Python."""
    while True:
        call = random_call(rng, PLAIN)
        if form != "python_list" or not has_dict(call["arguments"]):
            return call
