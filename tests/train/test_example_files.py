"""Data files of every format, and what is wrong with others: file, row and key in the message."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.text.openai_messages import FieldError
from llama.tokenizer import Tokenizer
from llama.train.encoding import encode_documents, encode_examples
from llama.train.example_files import read_examples
from llama.train.example_formats import KEYS, NoAnswerError, read_row
from llama.train.examples import (
    Conversation,
    Document,
    Example,
    Instruction,
    Preference,
    split_examples,
)
from tests.chat_models import vocabulary

ASKED, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
MESSAGES = {"messages": [ASKED, ANSWER]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
ALPACA = {"instruction": "Hi", "input": "", "output": "Hello"}
CALL = {"name": "f", "arguments": {"a": 1}}


def write(path: Path, *rows: Any, as_list: bool = False) -> Path:
    text = json.dumps(rows) if as_list else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, "utf-8")
    return path


def only(path: Path, format: str = "auto") -> Example:
    [example] = read_examples([path], format)
    return example


def contents(example: Example) -> list[tuple[str, str]]:
    assert isinstance(example, Conversation)
    return [(m["role"], m["content"]) for m in example.dialog]


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_formats_are_recognised_by_content(tmp_path: Path, as_list: bool, bom: str) -> None:
    extra = {"id": 7, "source": None}
    preference = {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}
    kinds: dict[type, dict[str, Any]] = {
        Conversation: MESSAGES, Instruction: ALPACA, Document: {"text": "Hi"},
        Preference: preference,
    }  # fmt: skip
    for kind, row in kinds.items():
        path = write(tmp_path / "data.txtl", row | extra, row, as_list=as_list)
        path.write_text(bom + path.read_text("utf-8"), "utf-8")
        examples = read_examples([path])
        assert [type(example) for example in examples] == [kind, kind]
        assert examples[1].where == f"{path}, {'row' if as_list else 'line'} 2"


def test_one_dialog_in_three_formats_has_equal_ids_and_masks(
    tmp_path: Path, llama3_tokenizer_path: Path
) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"),
             ("assistant", "So long.")]  # fmt: skip
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    messages = write(
        tmp_path / "m.jsonl", {"messages": [{"role": r, "content": c} for r, c in turns]}
    )
    sharegpt = write(
        tmp_path / "s.json",
        {"conversations": [{"from": names[r], "value": c} for r, c in turns]},
        {"system": turns[0][1],
         "conversations": [{"from": names[r], "value": c} for r, c in turns[1:]]},
        {"conversations": [{"role": r, "content": c} for r, c in turns]},
        as_list=True,
    )  # fmt: skip
    rows = encode_examples(
        read_examples([messages, sharegpt]), Tokenizer(llama3_tokenizer_path, "llama3.1")
    )
    assert len(rows) == 4
    for row in rows[1:]:
        assert np.array_equal(row.ids, rows[0].ids)
        assert np.array_equal(row.trained, rows[0].trained)
    assert int(rows[0].trained.sum()) == 2 + 4


def test_names_of_sharegpt_and_turns_before_the_first_users(tmp_path: Path) -> None:
    turns = [("gpt", "I am Bard."), ("user", "a"), ("bing", "b"), ("human", "c"), ("bard", "d"),
             ("human", "not answered")]  # fmt: skip
    path = write(
        tmp_path / "a.json", {"conversations": [{"from": f, "value": v} for f, v in turns]}
    )
    counts: Counter[str] = Counter()
    [example] = read_examples([path], "sharegpt", counts)
    assert contents(example) == [
        ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")
    ]  # fmt: skip
    assert counts == {"turns before the first user's": 1}


def test_tool_calls_of_openai_and_of_sharegpt(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": True}}
    function = {"name": "f", "arguments": '{"a": 1}'}
    asked = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    last = {"role": "assistant", "content": "done"}

    def dialog(calls: list[Any], *results: Any) -> dict[str, Any]:
        called = {"role": "assistant", "content": None, "tool_calls": calls}
        return {"messages": [asked, called, *results, last], "tools": [tool]}

    openai = dialog(
        [{"id": i, "type": "function", "function": function} for i in "pq"],
        {"role": "tool", "tool_call_id": "q", "content": "2"},
        {"role": "tool", "tool_call_id": "p", "content": "1"},
    )
    plain = dialog(
        [CALL, {"function": CALL}],
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    )
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "x"},
            {"from": "function_call", "value": json.dumps([CALL, CALL])},
            {"from": "observation", "value": "1"},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "done"},
        ],
        "tools": json.dumps([tool["function"]]),
    }
    examples = [
        read_examples([write(tmp_path / "a.jsonl", row)])[0] for row in (openai, plain, sharegpt)
    ]
    assert isinstance(examples[0], Conversation)
    assert [m["role"] for m in examples[0].dialog] == ["user", "assistant", "tool", "tool",
                                                       "assistant"]  # fmt: skip
    assert examples[0].dialog[1]["tool_calls"] == [CALL, CALL]
    assert [m["content"] for m in examples[0].dialog] == ["x", "", "1", "2", "done"]
    for example in examples[1:]:
        assert isinstance(example, Conversation)
        assert (example.dialog, example.tools) == (examples[0].dialog, examples[0].tools)


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("b.md", "a.txt"):
        (tmp_path / "texts" / name).write_text(f"[{name}]\nline", "utf-8")
    (tmp_path / "texts" / "empty.txt").write_text(" \n", "utf-8")
    lines = write(tmp_path / "c.jsonl", {"text": "one\ntwo"}, {"text": ""}, {"text": "three"})
    other = tmp_path / "d.log"
    other.write_text("{not JSON", "utf-8")
    counts: Counter[str] = Counter()
    examples = read_examples([tmp_path / "texts", lines, other], "text", counts)
    assert [e.text for e in examples if isinstance(e, Document)] == [
        "[a.txt]\nline", "[b.md]\nline", "one\ntwo", "three", "{not JSON"
    ]  # fmt: skip
    assert counts == {"empty text": 2}


def test_preferences(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
        {"messages": [ASKED], "chosen": ANSWER, "rejected": {"role": "assistant", "content": "No"}},
        {
            "chosen": [ASKED, ANSWER],
            "rejected": [ASKED, {"role": "assistant", "content": "No"}],
        },
    ]
    for example in read_examples([write(tmp_path / "a.jsonl", *rows)]):
        assert isinstance(example, Preference)
        assert example.prompt == (ASKED,) and example.chosen == ANSWER
        assert example.rejected["content"] == "No"


def test_rows_without_an_answer_are_counted(tmp_path: Path) -> None:
    rows = [
        MESSAGES,
        {"messages": [ASKED]},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [ASKED, {"role": "assistant", "content": " \n"}]},
        {"messages": []},
        {"messages": [ASKED, ANSWER | {"weight": 0}]},
        {"messages": [ASKED, ANSWER | {"weight": 0}, ASKED, ANSWER | {"weight": 1}]},
    ]
    counts: Counter[str] = Counter()
    examples = read_examples([write(tmp_path / "a.jsonl", *rows)], "messages", counts)
    assert [e.not_trained for e in examples if isinstance(e, Conversation)] == [set(), {1}]
    assert counts == {
        "no answer": 2, "empty answer": 1, "no turns": 1, "no answer of weight 1": 1
    }  # fmt: skip
    path = write(tmp_path / "b.jsonl", rows[1], rows[3], ALPACA | {"output": ""})
    with pytest.raises(ValueError, match=r"b\.jsonl, line 3: .*'instruction'"):
        read_examples([path])
    path = write(tmp_path / "b.jsonl", rows[1], rows[3])
    with pytest.raises(ValueError, match=r"b\.jsonl: nothing to train on \(1 with no answer, 1 wi"):
        read_examples([path])


BAD: list[tuple[str, Any, str]] = [
    ("auto", {"question": "a"}, "no known format has the keys 'question'; rename them. Formats and "
     "their keys: text: \"text\"; alpaca:"),
    ("messages", 3, "a row must be an object, not 3"),
    ("auto", ALPACA, "key 'instruction' of the format alpaca, but the file's format is messages"),
    ("alpaca", MESSAGES, "key 'messages' of the format messages, but the file's format is alpaca"),
    ("alpaca", {"instruction": "a"}, "no key 'output', which the format alpaca has. Formats"),
    ("alpaca", ALPACA | {"input": 3}, "input must be text, not 3"),
    ("alpaca", ALPACA | {"output": None}, "output must be text, not null"),
    ("text", {"text": ["a"]}, "text must be text, not a JSON array"),
    ("messages", {"messages": "a"}, 'messages must be a list of turns, not "a"'),
    ("messages", {"messages": [ASKED, {"role": "bot", "content": "a"}]},
     'messages[1].role must be one of "system", "developer", "user", "assistant", "tool", '
     '"ipython", not "bot"'),
    ("messages", {"messages": [ASKED, {"role": "assistant"}]},
     "messages[1].content must be text or a list of text parts, not null"),
    ("messages", {"messages": [ASKED, ANSWER | {"weight": 2}]}, "messages[1].weight must be 0 or"),
    ("messages", {"messages": [ASKED, ANSWER | {"tool_calls": [{"function": {
        "name": "f", "arguments": "{"}}]}]}, "messages[1].tool_calls[0].function.arguments: Expe"),
    ("messages", {"messages": [ASKED | {"tool_calls": [CALL]}, ANSWER]},
     "messages[0].tool_calls: only an assistant's message has tool_calls"),
    ("messages", MESSAGES | {"tools": [{"name": "f", "parameters": 3}]}, "tools[0].function.para"),
    ("messages", MESSAGES | {"tools": "["}, "tools is not JSON"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "conversations[0] has no key 'value'"),
    ("sharegpt", {"conversations": [{"value": "a"}, {"from": "gpt", "value": "a"}]},
     "conversations[0] has no key 'from'"),
    ("sharegpt", {"conversations": [{"from": "Bob", "value": "a"}]},
     'conversations[0].from is "Bob"; it must be one of human,'),
    ("sharegpt", {"conversations": [{"from": "human", "value": None}]},
     "conversations[0].value must be text, not null"),
    ("sharegpt", {"conversations": SHAREGPT["conversations"] * 2
                  + SHAREGPT["conversations"][1:]},
     "conversations[4]: turns must alternate, and assistant follows assistant"),
    ("sharegpt", {"conversations": [{"from": "function_call", "value": "x"}]},
     "conversations[0].value must be a call in JSON"),
    ("sharegpt", SHAREGPT | {"conversations": {"0": 1}}, "conversations must be a list of turns"),
    ("preference", {"chosen": "a", "rejected": "b"}, "no key 'prompt'"),
    ("preference", {"prompt": "a", "chosen": ASKED, "rejected": "b"}, "chosen must end with a mes"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "row", "message"), BAD)
def test_bad_rows(tmp_path: Path, format: str, row: Any, message: str) -> None:
    good = {"alpaca": ALPACA, "text": {"text": "a"}, "sharegpt": SHAREGPT}.get(format, MESSAGES)
    good = {"prompt": "a", "chosen": "b", "rejected": "c"} if format == "preference" else good
    path = write(tmp_path / "data.jsonl", good, row)
    if format == "auto" and row != ALPACA:
        path = write(tmp_path / "data.jsonl", row)
    line = len(path.read_text("utf-8").splitlines())
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}, line {line}: ")) as error:
        read_examples([path], format)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r", line 2, column 10: not JSON \(Expecting value\)"),
        (b'[{"text": "a"},\n {"text": }]', r", line 2, column 11: not JSON"),
        (b'{"text": "a"\n', r", line 1, column \d+: not JSON|line 2, column 1: not JSON"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r", byte 24: 0xff is not UTF-8; convert it to UTF"),
        ('{"text": "a"}'.encode("utf-16"), ", byte "),
        (b"", "is empty; leave it out"),
        (b"instruction,output\n", "is neither JSON, nor named .txt or .md"),
        (b"[" * 100_000, "line 1: JSON that cannot be read"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 1: JSON that cannot be read"),
        (b"[]", "nothing to train on; give more data"),
    ],
)
def test_files_that_are_not_json(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data\.json.*({message})"):
        read_examples([path])


def test_several_files(tmp_path: Path) -> None:
    messages = write(tmp_path / "m.jsonl", MESSAGES)
    alpaca = write(tmp_path / "a.json", ALPACA, ALPACA, as_list=True)
    assert len(read_examples([messages, alpaca, messages])) == 3  # a file counts once
    pretty = tmp_path / "one.json"
    pretty.write_text(json.dumps(MESSAGES, indent=2), "utf-8")
    assert contents(only(pretty)) == [("user", "Hi"), ("assistant", "Hello")]
    text = write(tmp_path / "t.jsonl", {"text": "a"})
    with pytest.raises(ValueError, match=r"m\.jsonl has the format messages, and .*t\.jsonl text"):
        read_examples([messages, alpaca, text])
    with pytest.raises(ValueError, match="unknown format 'csv'; use one of auto, preference"):
        read_examples([messages], "csv")
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist; give a data file"):
        read_examples([tmp_path / "none.json"])


def test_held_out_examples(tmp_path: Path) -> None:
    rows = [{"instruction": f"{i % 40}", "output": "a"} for i in range(60)]
    examples = read_examples([write(tmp_path / "a.jsonl", *rows)])
    train, held = split_examples(examples, 0.1, seed=3)

    def said(part: list[Example]) -> set[str]:
        return {example.instruction for example in part if isinstance(example, Instruction)}

    assert len(train) + len(held) == 60 and len(said(held)) == 4
    assert not said(train) & said(held)
    assert (train, held) == split_examples(examples, 0.1, seed=3)
    assert held != split_examples(examples, 0.1, seed=4)[1]
    assert split_examples(examples, 0)[1] == []
    assert len(said(split_examples(examples, 0.001)[1])) == 1
    for fraction in (-0.1, 1):
        with pytest.raises(ValueError, match="must be from 0 to below 1"):
            split_examples(examples, fraction)
    with pytest.raises(ValueError, match="one example cannot be split"):
        split_examples(examples[:1] * 2, 0.5)


def test_the_end_of_each_of_a_few_texts_is_held_out() -> None:
    documents = [Document("a", "x" * 90 + "y" * 10), Document("b", "z" * 9 + "w")]
    train, held = split_examples(documents, 0.1)
    assert [e.text for e in train if isinstance(e, Document)] == ["x" * 90, "z" * 9]
    assert [e.text for e in held if isinstance(e, Document)] == ["y" * 10, "w"]
    t = Tokenizer.from_vocabulary(*vocabulary(), "bytes")
    ids = [[i for row in encode_documents([d], t, 1000) for i in row.ids] for d in (*train, *held)]  # type: ignore[list-item]
    ends = [(i[0] == t.bos_id, i[-1] == t.eos_id) for i in ids]
    assert ends == [(True, False), (True, False), (False, True), (False, True)]
    many = [Document(str(i), f"{i}") for i in range(40)]
    train, held = split_examples(many, 0.1)
    assert len(held) == 4 and set(train) | set(held) == set(many)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
ROWS: dict[str, dict[str, Any]] = {
    "alpaca": ALPACA,
    "sharegpt": SHAREGPT | {"tools": "[]", "system": "x"},
    "messages": {
        "messages": [ASKED, {"role": "assistant", "tool_calls": [CALL | {"id": "a"}], "weight": 1},
                     {"role": "tool", "tool_call_id": "a", "content": "1"}, ANSWER],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
    "text": {"text": "a"},
    "preference": {"prompt": "Hi", "chosen": [ASKED, ANSWER], "rejected": "c"},
}  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(KEYS)), JSON, st.randoms(use_true_random=False))
def test_any_value_in_any_place(name: str, value: Any, rng: random.Random) -> None:
    """It is taken, left out, or refused with its path."""
    row = json.loads(json.dumps(ROWS[name]))
    read_row(row, name, "line 1")
    place: Any = row
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not isinstance(place[key], (dict, list)) or not place[key] or rng.random() < 0.4:
            break
        place = place[key]
    place[key] = value
    with suppress(NoAnswerError, FieldError):
        read_row(row, name, "line 1")
