"""What only files of training data may have in messages; the server's rules have tests there."""

from __future__ import annotations

from typing import Any

import pytest

from llama.text.openai_messages import FieldError, MessageReader

CALL = {"name": "f", "arguments": {"a": 1}}
ASKED = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("messages", "path"),
    [
        ([ASKED, {"role": "ipython", "content": "1"}], "messages[1].role"),
        (
            [ASKED, {"role": "assistant", "tool_calls": [CALL]}],
            "messages[1].tool_calls[0].function",
        ),
        (
            [ASKED, {"role": "assistant", "tool_calls": [{"id": "a", "function": CALL}]}],
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            [
                ASKED,
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
                },
            ],
            "messages[1].tool_calls[0].id",
        ),
        ([ASKED, {"role": "tool", "content": "1"}], "messages[1].tool_call_id"),
    ],
)
def test_lenient_and_strict(messages: list[Any], path: str) -> None:
    dialog = MessageReader(lenient=True).messages(messages, "messages")
    assert [m["role"] for m in dialog] == [m["role"] for m in messages]
    with pytest.raises(FieldError) as error:
        MessageReader().messages(messages, "messages")
    assert error.value.path == path and path in str(error.value)


def test_results_come_in_the_order_of_the_calls() -> None:
    called = {"role": "assistant", "tool_calls": [{"id": i, "function": CALL} for i in "pq"]}
    results = [{"role": "tool", "tool_call_id": i, "content": i} for i in "qp"]
    dialog = MessageReader(lenient=True).messages([ASKED, called, *results], "messages")
    assert [m["content"] for m in dialog[2:]] == ["p", "q"]
    twice = [ASKED, called, results[0], results[0]]
    with pytest.raises(FieldError, match="has a result already"):
        MessageReader(lenient=True).messages(twice, "messages")


def test_stop_reason_is_kept_in_training_data() -> None:
    called = {"role": "assistant", "content": "x", "stop_reason": "end_of_message"}
    [_, kept] = MessageReader(lenient=True).messages([ASKED, called], "messages")
    [_, ignored] = MessageReader().messages([ASKED, called], "messages")
    assert kept["stop_reason"] == "end_of_message" and "stop_reason" not in ignored
