"""Masks and ids of rows, token by token: written by hand, by llama-models, by transformers."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.text.messages import Message
from llama.text.tool_prompt import ToolForm
from llama.tokenizer import ChatFormat, Tokenizer
from llama.train.encoding import (
    ExampleEncoder,
    alpaca_prompt,
    encode_documents,
    encode_example,
    encode_examples,
)
from llama.train.example_formats import read_row
from llama.train.examples import Conversation, Document, Instruction, Preference
from llama.train.rows import Row
from llama.train.show_rows import show
from tests.chat_models import BEGIN, EOT, MODELS, vocabulary, write_hf_tokenizer
from tests.text.test_chat_template import CALLS, WRAPPED, apply, ours, theirs_calls
from tests.text.test_foreign_templates import load
from tests.text.tool_calls import to_meta

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look outside",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"name": "get_weather", "arguments": {"city": "Oslo"}}
TURNS: tuple[Message, ...] = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <|eot_id|>"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
)


def conversation(*messages: Message, **fields: Any) -> Conversation:
    return Conversation("data.jsonl, line 1", messages, **fields)


def texts(row: Row, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """(text of a token, whether it is trained) of each token."""
    pairs = zip(row.ids.tolist(), row.trained.tolist(), strict=True)
    return [(tokenizer.decode([i]), trained) for i, trained in pairs]


def marked(row: Row, tokenizer: Tokenizer) -> str:
    """The row's text with « » around what is trained."""
    text, was = "", False
    for part, trained in [*texts(row, tokenizer), ("", False)]:
        text += ("«" if trained and not was else "»" if was and not trained else "") + part
        was = trained
    return text


def chatml(**sidecar: Any) -> Tokenizer:
    ranks, given = vocabulary()
    changes = {"chat_format": "chatml", "stop_tokens": ["<|im_end|>"]} | sidecar
    return Tokenizer.from_vocabulary(ranks, given | changes, "chatml")


@pytest.fixture(scope="module")
def llama3(llama3_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(llama3_tokenizer_path)


@pytest.fixture(scope="module")
def llama31(llama3_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(llama3_tokenizer_path, "llama3.1")


def test_llama_3_token_by_token(llama3: Tokenizer) -> None:
    [row] = encode_example(conversation(*TURNS), llama3)
    header = ["<|start_header_id|>", "{}", "<|end_header_id|>", "\n\n"]
    expected = [("<|begin_of_text|>", False)]
    for role, parts in [
        ("system", ["Be", " brief", "."]),
        ("user", ["Hi", " <|", "e", "ot", "_id", "|", ">"]),  # text, not the token
        ("assistant", ["Hello", "!"]),
        ("user", ["By", "e"]),
        ("assistant", ["So", " long", "."]),
    ]:
        expected += [(text.format(role), False) for text in header]
        expected += [(text, role == "assistant") for text in (*parts, EOT)]
    assert texts(row, llama3) == expected
    assert row.ids.tolist().count(llama3.eot_id) == 5


def test_chatml_token_by_token() -> None:
    t = chatml()
    [row] = encode_example(conversation(*TURNS), t)
    assert marked(row, t) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|eot_id|><|im_end|>\n"
        "<|im_start|>assistant\n«Hello!<|im_end|>»\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n«So long.<|im_end|>»"
    )
    assert t.eot_id not in row.ids


def test_prompts_are_those_of_inference_and_one_bos(llama31: Tokenizer) -> None:
    for t in (llama31, chatml(), chatml(chat_bos="<|begin_of_text|>")):
        [row] = encode_example(conversation(*TURNS), t)
        ids, chat = row.ids.tolist(), ChatFormat(t)
        for i in (2, 4):
            prompt = chat.encode_dialog_prompt(TURNS[:i])
            assert ids[: len(prompt)] == prompt
            assert not row.trained[len(prompt) - 1] and row.trained[len(prompt)]
        assert ids.count(t.bos_id) == prompt.count(t.bos_id) <= 1


@pytest.mark.parametrize(
    ("form", "written"),
    [
        ("json", '{"type": "function", "name": "get_weather", "parameters": {"city": "Oslo"}}'),
        ("python_list", '[get_weather(city="Oslo")]'),
        ("function_tag", '<function=get_weather>{"city": "Oslo"}</function>'),
    ],
)
def test_calls_of_tools(llama31: Tokenizer, form: ToolForm, written: str) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "a",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "a", "content": "21"},
            {"role": "assistant", "content": "Warm."},
        ],
        "tools": [WEATHER],
    }
    example = read_row(row, "messages", "line 1")
    assert isinstance(example, Conversation)
    [encoded] = encode_example(example, llama31, tool_form=form)
    parts = [part.split("»")[0] for part in marked(encoded, llama31).split("«")[1:]]
    assert parts == [f"{written}{EOT}", f"Warm.{EOT}"]
    prompt = ChatFormat(llama31).encode_dialog_prompt(example.dialog[:1], [WEATHER], form)
    assert encoded.ids[: len(prompt)].tolist() == prompt


def test_code_and_end_of_message_as_meta_writes_them(
    llama31: Tokenizer, llama3_tokenizer_path: Path
) -> None:
    from llama_models.datatypes import RawMessage, StopReason, ToolPromptFormat
    from llama_models.llama3.chat_format import ChatFormat as MetaChatFormat
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    code: Message = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "code_interpreter", "arguments": {"code": "print(6 * 7)"}}],
        "stop_reason": "end_of_message",
    }
    asked: Message = {"role": "user", "content": "6 * 7?"}
    tools = ("code_interpreter",)
    [row] = encode_example(conversation(asked, code, tools=tools), llama31)
    assert marked(row, llama31).endswith("«<|python_tag|>print(6 * 7)<|eom_id|>»")
    raw = RawMessage(role="assistant", content="", stop_reason=StopReason.end_of_message)
    raw.tool_calls = [to_meta(code["tool_calls"][0])]
    meta = MetaChatFormat(MetaTokenizer(llama3_tokenizer_path))
    theirs = meta.encode_message(raw, ToolPromptFormat.json)[0]
    header = ChatFormat(llama31).encode_header(code)
    assert row.ids[row.trained].tolist() == theirs[len(header) :]


def test_alpaca_without_a_chat_format() -> None:
    t = chatml(chat_format=None)
    for extra, middle in [("", ""), ("3, 4", "\n\n### Input:\n3, 4")]:
        [row] = encode_example(Instruction("line 1", "Add.", extra, "7"), t)
        context = ", paired with an input that provides further context" if extra else ""
        assert marked(row, t) == (
            f"<|begin_of_text|>Below is an instruction that describes a task{context}. "
            "Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\nAdd.{middle}\n\n### Response:«7{EOT}»"
        )
        assert row.ids[0] == t.bos_id
        prompt = t.encode(alpaca_prompt("Add.", extra))
        assert row.ids[: len(prompt)].tolist() == prompt
    asked, answer = TURNS[1:3]
    [row] = encode_example(conversation(asked, answer), t)
    [same] = encode_example(Instruction("", asked["content"], "", answer["content"]), t)
    assert row.ids.tolist() == same.ids.tolist()
    with pytest.raises(ValueError, match=r"data\.jsonl, line 1: Alpaca's template has one quest"):
        encode_example(conversation(*TURNS), t)


def test_alpaca_with_a_chat_format_is_a_dialog(llama3: Tokenizer) -> None:
    [row] = encode_example(Instruction("line 1", "Add.", "3, 4", "7"), llama3)
    asked: Message = {"role": "user", "content": "Add.\n\n3, 4"}
    [same] = encode_example(conversation(asked, {"role": "assistant", "content": "7"}), llama3)
    assert row.ids.tolist() == same.ids.tolist() and row.trained.tolist() == same.trained.tolist()
    [plain] = ExampleEncoder(llama3, "alpaca").rows(Instruction("", "Add.", "", "7"))
    assert marked(plain, llama3).endswith("### Response:«7<|end_of_text|>»")


TEMPLATES = [n for n, m in MODELS.items() if m.chat_format == "template" and "R1" not in n]


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_of_published_models(name: str, tmp_path: Path) -> None:
    """The whole row is what transformers writes of the dialog, up to the last answer's end."""
    model = MODELS[name]
    chat, theirs = load(tmp_path, model.settings()["chat_template"], eos=model.eos)
    t = chat.tokenizer
    system, asked, *rest = TURNS
    asked = {"role": "user", "content": "Hi"}  # transformers takes the text of a token for it
    dialog = [system, asked, *rest] if "system" in chat.roles else [asked, *rest]
    [row] = encode_example(conversation(*dialog), t)
    space = " " if "INST" in name else ""  # this template writes spaces around an answer
    parts = [part.split("»")[0] for part in marked(row, t).split("«")[1:]]
    assert parts == [f"{space}{text}{space}{model.end}" for text in ("Hello!", "So long.")]
    prompt = theirs.apply_chat_template(dialog[:-1], add_generation_prompt=True, return_dict=False)
    whole = theirs.apply_chat_template(dialog, return_dict=False)
    ids = row.ids.tolist()
    assert ids[: len(prompt)] == prompt and whole[: len(ids)] == ids


@pytest.mark.parametrize(
    "name", ["nvidia/Llama-3.1-Nemotron-Nano-8B-v1", "NousResearch/Hermes-3-Llama-3.1-8B"]
)
def test_calls_as_chat_templates_write_them(name: str, tmp_path: Path) -> None:
    write_hf_tokenizer(tmp_path, MODELS[name])
    t, theirs = ours(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    last: Message = {"role": "assistant", "content": "Grey."}
    [row] = encode_example(conversation(*CALLS, last, tools=(WRAPPED,)), t)
    prompt = apply(theirs, theirs_calls(), [WRAPPED])
    assert row.ids[: len(prompt)].tolist() == prompt and not row.trained[len(prompt) - 1]
    call, answer = (part.split("»")[0] for part in marked(row, t).split("«")[1:])
    assert call.startswith("<") and '"n": [1, null]' in call and call.count("<|") == 1
    assert answer == f"Grey.{MODELS[name].end}"


@pytest.mark.parametrize(("after_role", "format"), [("\n", "chatml"), (": ", "template")])
def test_masks_equal_those_of_transformers(tmp_path: Path, after_role: str, format: str) -> None:
    """ChatML, or similar, with `generation` blocks, which transformers makes a mask of."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + 'AFTER' }}"
        "{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistantAFTER' }}{% endif %}"
    )
    chat, theirs = load(tmp_path, template.replace("AFTER", after_role))
    assert chat.tokenizer.chat_format == format
    rng = random.Random(0)
    for _ in range(30):
        dialog: list[Message] = []
        for _ in range(rng.randint(1, 4)):
            asked, answer = ("".join(rng.choices("ab é\n日.", k=9)) + "x" for _ in range(2))
            dialog.append({"role": "user", "content": asked})
            dialog.append({"role": "assistant", "content": answer})
        expected = theirs.apply_chat_template(
            dialog, return_dict=True, return_assistant_tokens_mask=True
        )
        [row] = encode_example(conversation(*dialog), chat.tokenizer)
        n = len(row.ids)
        assert row.ids.tolist() == expected["input_ids"][:n]
        assert row.trained.tolist() == list(map(bool, expected["assistant_masks"][:n]))
        assert not any(expected["assistant_masks"][n:])


def test_a_template_that_rewrites_history_gives_rows(tmp_path: Path) -> None:
    """This one leaves reasoning out of earlier answers, as DeepSeek's does."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + "
        "(m.content.split('</think>')[-1] if m.role == 'assistant' else m.content) "
        "+ '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    chat, _ = load(tmp_path, template)
    t = chat.tokenizer
    asked, _, again, last = TURNS[1:]
    thinking: Message = {"role": "assistant", "content": "Hm.</think>Hello!"}
    rows = encode_example(conversation(asked, thinking, again, last), t)
    first = "<|im_start|>user\nHi <|eot_id|><|im_end|>\n<|im_start|>assistant\n"
    assert [marked(row, t) for row in rows] == [
        f"{first}«Hm.</think>Hello!<|im_end|>»",
        f"{first}Hello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
        "«So long.<|im_end|>»",
    ]


def test_reasoning_after_a_prompt_that_opens_it(tmp_path: Path) -> None:
    """The prompt ends with <think>: an answer that begins with it has it once."""
    model = MODELS["deepseek-ai/DeepSeek-R1-Distill-Llama-8B"]
    t = load(tmp_path, model.settings()["chat_template"], eos=model.eos)[0].tokenizer
    asked, answer = TURNS[3:]
    for content in ("<think>\nHm.</think>\n\nSo long.", "Hm.</think>\n\nSo long."):
        thinking: Message = {"role": "assistant", "content": content}
        rows = encode_example(conversation(asked, thinking, asked, answer), t)
        begin, end = "<｜User｜>Bye<｜Assistant｜>", model.end  # noqa: RUF001
        assert [marked(row, t) for row in rows] == [
            f"{BEGIN}{begin}<think>\n«Hm.</think>\n\nSo long.{end}»",
            f"{BEGIN}{begin}\n\nSo long.{end}{begin}<think>\n«So long.{end}»",
        ]


def test_answers_of_weight_0_are_context(llama3: Tokenizer) -> None:
    [row] = encode_example(conversation(*TURNS, not_trained=frozenset({2})), llama3)
    [whole] = encode_example(conversation(*TURNS), llama3)
    assert row.ids.tolist() == whole.ids.tolist()
    assert marked(row, llama3).count("«") == 1 and int(row.trained.sum()) == 4


def test_preferences(llama3: Tokenizer) -> None:
    good, bad = TURNS[4], Message(role="assistant", content="No.")
    example = Preference("line 1", TURNS[:4], good, bad)
    for row, answer in zip(ExampleEncoder(llama3).pair(example), (good, bad), strict=True):
        prompt = ChatFormat(llama3).encode_dialog_prompt(TURNS[:4])
        assert row.ids[: len(prompt)].tolist() == prompt
        assert row.trained.tolist() == [False] * len(prompt) + [True] * (len(row.ids) - len(prompt))
        assert llama3.decode(row.ids[len(prompt) :].tolist()) == answer["content"] + EOT


@pytest.mark.parametrize(
    ("tokenizer", "message", "text"),
    [
        ("llama3", {"role": "tool", "content": "x"}, "unknown role 'tool'"),
        ("chatml", {"role": "assistant", "content": "", "tool_calls": [CALL]}, "no tokens for"),
        ("bare", {"role": "user", "content": "x"}, "Alpaca's template"),
    ],
)
def test_messages_that_the_format_lacks(
    llama3: Tokenizer, tokenizer: str, message: Any, text: str
) -> None:
    t = {"llama3": llama3, "chatml": chatml(), "bare": chatml(chat_format=None)}[tokenizer]
    with pytest.raises(ValueError, match=rf"^data\.jsonl, line 1: .*{text}"):
        encode_example(conversation(*TURNS, message, TURNS[2]), t)


def test_half_a_surrogate_pair_is_replaced(llama3: Tokenizer) -> None:
    """JSON can have one, and no encoding has it."""
    asked, answer = (
        Message(role="user", content="a\ud800"),
        Message(role="assistant", content="\udfff"),
    )
    for t in (llama3, chatml()):
        [row] = encode_example(conversation(asked, answer), t)
        assert "a\ufffd" in t.decode(row.ids.tolist()) and "\ufffd" in show([row], t)


def test_no_end_token() -> None:
    t = chatml(chat_format=None, eos_token=None, stop_tokens=[])
    with pytest.raises(ValueError, match="no token that ends a text"):
        ExampleEncoder(t)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=40), max_size=5), st.integers(1, 30))
def test_no_id_of_a_text_is_lost(documents: list[str], block: int) -> None:
    """Blocks joined at their shared id are the documents, each with BOS and EOS."""
    t = chatml(eos_token=EOT)
    stream = [i for text in documents for i in t.encode(text, bos=True, eos=True)]
    rows = encode_documents([Document("", text) for text in documents], t, block)
    assert [i for row in rows for i in row.ids[row.trained].tolist()] == stream[1:]
    assert [len(row.ids) for row in rows[:-1]] == [block + 1] * (len(rows) - 1)
    for before, row in pairwise(rows):
        assert before.ids[-1] == row.ids[0] and not row.trained[0] and row.trained[1:].all()
    assert not rows or rows[0].ids[0] == stream[0]


def test_long_texts_are_encoded_in_passages_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.train.encoding.PASSAGE", 100)
    t, text = chatml(), "some words of text " * 100
    rows = encode_documents([Document("", text)], t, 64)
    ids = np.concatenate([rows[0].ids[:1], *(row.ids[1:] for row in rows)])
    assert ids.tolist() == t.encode(text, bos=True, eos=True)


def test_kinds_that_do_not_mix(llama3: Tokenizer) -> None:
    with pytest.raises(ValueError, match="line 2: a document among dialogs"):
        encode_examples([conversation(*TURNS), Document("line 2", "x")], llama3)


def test_shown_rows(llama3: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    asked: Message = {"role": "user", "content": "a\x1b[31mb\u202e"}
    answer: Message = {"role": "assistant", "content": "c\rd"}
    rows = encode_example(conversation(asked, answer), llama3)
    shown = show(rows, llama3)
    assert "a\\x1b[31mb\\u202e<|eot_id|>" in shown
    assert shown.endswith("[[c\\x0dd<|eot_id|>]]")
    assert f"{len(rows[0].ids)} tokens, 4 trained" in shown
    colored = show(rows, llama3, color=True)
    assert colored.endswith("\x1b[32mc\\x0dd<|eot_id|>\x1b[0m") and colored.count("\x1b") == 2
    monkeypatch.setenv("NO_COLOR", "1")
    assert show(rows, llama3, color=True) == shown
    assert json.dumps(show(rows * 5, llama3, n=2)).count("Row ") == 2
