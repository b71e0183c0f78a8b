"""One JSON value of a data file -> an `Example`. Knows nothing about files or token ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

from llama.common.printable import quoted
from llama.text.messages import Message
from llama.text.openai_messages import FieldError, MessageReader
from llama.text.tool_prompt import Tool
from llama.train.examples import Conversation, Document, Example, Instruction, Preference

# What a row of each format has. In this order, as a row of preferences may have messages too.
KEYS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
KNOWN = "; ".join(
    f"{name}: {', '.join(map(json.dumps, keys))}" for name, keys in reversed(KEYS.items())
)
DIALOGS = ("messages", "sharegpt", "alpaca")
# ShareGPT's names and their role; calls and results as in LLaMA-Factory's files.
_ROLES = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bing": "assistant",
    "bard": "assistant", "model": "assistant",
    "system": "system",
    "function_call": "call", "tool_call": "call",
    "observation": "tool", "tool": "tool", "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
_READER = MessageReader(lenient=True)


class NoAnswerError(ValueError):
    """An example that has nothing to train. The message says why, in a few words."""


def recognise(row: Any) -> str | None:
    """The format of a row by its keys; None if there is none."""
    if not isinstance(row, dict):
        return None
    return next((name for name, keys in KEYS.items() if set(keys) <= set(row)), None)


def read_row(row: Any, name: str, where: str) -> Example:
    """A row of the format `name`.

    Raises:
        FieldError: a key is missing, or has another type.
        NoAnswerError: it has no answer to train.
    """
    if not isinstance(row, dict):
        raise FieldError("", f"a row must be an object, not {quoted(row)}")
    if missing := [key for key in KEYS[name] if key not in row]:
        raise FieldError(
            missing[0],
            f"no key {missing[0]!r}, which the format {name} has. Formats and their keys: {KNOWN}",
        )
    if name == "preference":
        return _preference(row, where)
    if name == "alpaca":
        texts = [_text(row, key) for key in ("instruction", "output")]
        given = _text(row, "input") if row.get("input") is not None else ""
        if not texts[1].strip():
            raise NoAnswerError("empty answer")
        return Instruction(where, texts[0], given, texts[1])
    if name == "text":
        if not (text := _text(row, "text")).strip():
            raise NoAnswerError("empty text")
        return Document(where, text)
    key = KEYS[name][0]
    weights = _weights(row[key])
    dialog = _dialog(row[key], key)
    if isinstance(row.get("system"), str) and row["system"].strip() and name == "sharegpt":
        if dialog[0]["role"] == "system":
            raise FieldError("system", "'system', and a system turn in 'conversations'; remove one")
        dialog, weights = ({"role": "system", "content": row["system"]}, *dialog), [1, *weights]
    return _conversation(dialog, weights, _tools(row), where)


def _text(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise FieldError(key, f"{key} must be text, not {quoted(row[key])}")
    return str(row[key])


def _tools(row: Mapping[str, Any]) -> tuple[Tool, ...]:
    """The definitions of tools: a list, or its JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as e:
            raise FieldError("tools", f"tools is not JSON: {e}") from None
    return _READER.tools(tools, "tools") if tools else ()


def _dialog(value: Any, path: str) -> tuple[Message, ...]:
    """Messages from turns of either shape: role and content, or from and value."""
    if not isinstance(value, list):
        raise FieldError(path, f"{path} must be a list of turns, not {quoted(value)}")
    if not value:
        raise NoAnswerError("no turns")
    if not any(isinstance(turn, dict) and "from" in turn for turn in value):
        return _READER.messages(value, path)
    dialog = _READER.messages(
        [_sharegpt_turn(turn, f"{path}[{i}]") for i, turn in enumerate(value)], path
    )
    _check_alternation(dialog, path)
    return dialog


def _sharegpt_turn(turn: Any, path: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise FieldError(path, f"{path} must be an object with from and value, not {quoted(turn)}")
    for key in ("from", "value"):
        if key not in turn:
            raise FieldError(f"{path}.{key}", f"{path} has no key {key!r}")
    who, text = turn["from"], turn["value"]
    role = _ROLES.get(who) if isinstance(who, str) else None
    if role is None:
        known = ", ".join(_ROLES)
        raise FieldError(f"{path}.from", f"{path}.from is {quoted(who)}; it must be one of {known}")
    if not isinstance(text, str):
        raise FieldError(f"{path}.value", f"{path}.value must be text, not {quoted(text)}")
    if role != "call":
        return {"role": role, "content": text}
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise FieldError(f"{path}.value", f"{path}.value must be a call in JSON: {e}") from None
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": calls if isinstance(calls, list) else [calls],
    }


def _check_alternation(dialog: tuple[Message, ...], path: str) -> None:
    """Check that the assistant answers each turn, as FastChat does. A call may have two results."""
    for i, (one, other) in enumerate(pairwise(dialog), 1):
        roles = one["role"], other["role"]
        if roles == ("tool", "tool") or (roles[0] == "system" and i == 1):
            continue
        if (roles[0] == "assistant") == (roles[1] == "assistant") or "system" in roles:
            raise FieldError(
                f"{path}[{i}]",
                f"{path}[{i}]: turns must alternate, and {roles[1]} follows {roles[0]}",
            )


def _weights(turns: Any) -> list[float]:
    """OpenAI's `weight` of each message: 0 means not to train on it."""
    weights: list[float] = []
    for i, turn in enumerate(turns if isinstance(turns, list) else ()):
        weight = turn.get("weight") if isinstance(turn, dict) else None
        if weight not in (None, 0, 1):
            path = f"messages[{i}].weight"
            raise FieldError(path, f"{path} must be 0 or 1, not {quoted(weight)}")
        weights.append(1 if weight is None else weight)
    return weights


def _conversation(
    dialog: tuple[Message, ...], weights: list[float], tools: tuple[Tool, ...], where: str
) -> Conversation:
    """A dialog from its first user's turn (after a system turn) to its last answer.

    Raises:
        NoAnswerError: there is no answer, or one is empty.
    """
    start = 1 if dialog[0]["role"] == "system" else 0
    end = max((i + 1 for i, m in enumerate(dialog) if m["role"] == "assistant"), default=0)
    leading = start
    while leading < end and dialog[leading]["role"] == "assistant":
        leading += 1
    if leading >= end:
        raise NoAnswerError("no answer")
    kept = (*dialog[:start], *dialog[leading:end])
    used = (*weights[:start], *weights[leading:end])
    answers = [i for i, m in enumerate(kept) if m["role"] == "assistant"]
    if not all(kept[i]["content"].strip() or kept[i].get("tool_calls") for i in answers):
        raise NoAnswerError("empty answer")
    not_trained = frozenset(i for i in answers if not used[i])
    if len(not_trained) == len(answers):
        raise NoAnswerError("no answer of weight 1")
    return Conversation(where, kept, tools, not_trained, leading - start)


def _preference(row: Mapping[str, Any], where: str) -> Preference:
    """A prompt (text or messages, or what both answers begin with) and two answers."""
    found = next((key for key in ("prompt", "messages") if row.get(key) is not None), None)
    answers = [_answers(row[key], key) for key in ("chosen", "rejected")]
    if found is None:
        prompt: tuple[Message, ...] = answers[0][:-1]
        if answers[1][:-1] != prompt:
            raise FieldError("rejected", "chosen and rejected begin differently; give a prompt")
    elif isinstance(row[found], str):
        prompt = (cast(Message, {"role": "user", "content": row[found]}),)
    else:
        prompt = _dialog(row[found], found)
    if not prompt:
        raise FieldError("prompt", "no key 'prompt'")
    lasts = [answer[-1] for answer in answers]
    for key, last, answer in zip(("chosen", "rejected"), lasts, answers, strict=True):
        if last["role"] != "assistant":
            raise FieldError(key, f"{key} must end with a message of the assistant")
        if found is not None and answer[:-1] not in ((), prompt):
            raise FieldError(key, f"{key} must be one answer to the prompt")
        if not last["content"].strip() and not last.get("tool_calls"):
            raise NoAnswerError("empty answer")
    return Preference(where, prompt, lasts[0], lasts[1], _tools(row))


def _answers(value: Any, path: str) -> tuple[Message, ...]:
    """An answer: text, a message, or a dialog that ends with it."""
    if isinstance(value, str):
        return (cast(Message, {"role": "assistant", "content": value}),)
    return _dialog([value] if isinstance(value, dict) else value, path)
