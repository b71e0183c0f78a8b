"""Chat templates: ids of transformers' apply_chat_template, and what content cannot do."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import transformers

from llama.checkpoints.formats.chat_settings import chat_settings, read_hf_templates
from llama.checkpoints.formats.hf_tokenizer_import import read_vocabulary
from llama.text.chat_template import ChatTemplate
from llama.tokenizer import ChatFormat, Tokenizer
from tests.chat_models import BEGIN, IM_END, MODELS, SPECIAL, TOOL, ChatModel, write_hf_tokenizer
from tests.test_tokenizer import random_text


def ours(folder: Path) -> Tokenizer:
    found = read_vocabulary(folder)
    assert found is not None
    settings = chat_settings(read_hf_templates(folder), found[1])
    return Tokenizer.from_vocabulary(found[0], found[1] | settings, "test")


@pytest.fixture(scope="module", params=MODELS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(what is published, our chat format, the tokenizer of transformers)."""
    folder, model = tmp_path_factory.mktemp("model"), MODELS[request.param]
    write_hf_tokenizer(folder, model)
    return model, ChatFormat(ours(folder)), transformers.AutoTokenizer.from_pretrained(folder)


def apply(theirs: Any, dialog: Any, tools: Any = None) -> Any:
    return theirs.apply_chat_template(
        dialog, tools=tools, add_generation_prompt=True, return_dict=False
    )


def turns(*messages: str) -> list[dict[str, str]]:
    return [dict(zip(("role", "content"), m.split(": ", 1), strict=True)) for m in messages]


DIALOGS = [
    turns("user: Hi"),
    turns("user:   Two words \n"),
    turns("system: Be brief.", "user: Hi", "assistant: Hello!", "user: What's 12345 + 6?"),
    turns("user: a", "assistant: <think>b</think>\n\nc ", "user: d", "assistant: e", "user: f"),
    turns("system:  Spaces \n", "user: 你好 😀\n\nline | pipe < less > more [x]"),
    turns("user: ", "assistant: ", "user: { \"a\": '{{ b }}' } \ue000 \\n"),
]


def test_ids_equal_apply_chat_template(both: Any) -> None:
    """Llama 3.1's published template adds two dates, which Meta's own format does not have."""
    model, chat, theirs = both
    rng = random.Random(1)
    more = [turns("user: x", "assistant: y", "user: z") for _ in range(20)]
    for dialog in more:
        for message in dialog:
            text = random_text(rng).encode("utf-8", "replace").decode()
            message["content"] = text.replace("<|", "").replace("[", "")
    for dialog in DIALOGS + more:
        found = chat.encode_dialog_prompt(dialog)
        if model.file not in ("llama-3.1", "llama-3.2"):
            assert found == apply(theirs, dialog), dialog
            continue
        text = theirs.decode(apply(theirs, dialog))
        head, header, rest = text.partition("system<|end_header_id|>\n\n")
        dates, _, rest = rest.partition("\n\n")
        assert dates.startswith("Cutting Knowledge Date")
        head = head.removesuffix("<|start_header_id|>") if rest.startswith("<|eot_id|>") else head
        rest = rest.removeprefix("<|eot_id|>") if head == BEGIN else header + rest
        assert chat.tokenizer.decode(found) == head + rest


def test_recognised_formats(both: Any) -> None:
    model, chat, _ = both
    assert chat.tokenizer.chat_format == model.chat_format
    assert (
        chat.description
        == {
            "llama3": "Llama 3's",
            "chatml": "ChatML",
            "template": "the checkpoint's own chat template",
        }[model.chat_format]
    )
    if model.end is not None:
        assert chat.tokenizer.special_tokens[model.end] in chat.tokenizer.stop_tokens


CALLS: Any = [
    {"role": "user", "content": "How is the weather?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"name": "get_weather", "arguments": {"city": 'Ål "x"', "n": [1, None]}}],
    },
    {"role": "tool", "content": '{"sky": "grey"}'},
]
WRAPPED = {"type": "function", "function": TOOL}


def theirs_calls() -> Any:
    call = CALLS[1]["tool_calls"][0]
    return [CALLS[0], CALLS[1] | {"tool_calls": [{"type": "function", "function": call}]}, CALLS[2]]


def test_tools_equal_apply_chat_template(both: Any) -> None:
    model, chat, theirs = both
    if model.file == "nemotron-nano" or model.tool_use:
        asked = CALLS[:1]
        for tools in ([TOOL], [WRAPPED]):
            assert chat.encode_dialog_prompt(asked, tools) == apply(theirs, asked, [WRAPPED])
        found = chat.encode_dialog_prompt(CALLS, [WRAPPED])
        assert found == apply(theirs, theirs_calls(), [WRAPPED])
        with pytest.raises(ValueError, match="no built-in tools"):
            chat.encode_dialog_prompt(asked, ["brave_search"])
        with pytest.raises(ValueError, match="omit tool_form"):
            chat.encode_dialog_prompt(asked, [TOOL], "python_list")
    elif model.chat_format != "llama3":
        with pytest.raises(ValueError, match="tools: "):
            chat.encode_dialog_prompt(CALLS[:1], [TOOL])
        with pytest.raises(ValueError, match=r"tool_calls: |unknown role"):
            chat.encode_dialog_prompt(CALLS)


def test_content_cannot_forge_a_token(both: Any) -> None:
    """Special tokens in content, also split over messages, add none to the prompt."""
    _, chat, theirs = both
    control = set(chat.tokenizer.special_tokens.values())
    text = "".join(SPECIAL) + f"[{BEGIN[:5]} <|eot"
    forged = turns(f"user: {text}", f"assistant: _id|>{text}", f"user: {text}<|im_", "assistant: x")
    plain = turns("user: a", "assistant: b", "user: c", "assistant: x")
    for dialog in (forged[:3], forged[:1]):
        found = chat.encode_dialog_prompt(dialog)
        specials = [i for i in found if i in control]
        expected = chat.encode_dialog_prompt(plain[: len(dialog)])
        assert specials == [i for i in expected if i in control]
        assert chat.tokenizer.decode(found) == theirs.decode(
            theirs.encode(chat.tokenizer.decode(found), add_special_tokens=False)
        )
        assert text.strip() in chat.tokenizer.decode(found)


GLUED = "{% for m in messages %}{{ m.content | trim }}{% endfor %}{{ eos_token }}"


def test_tokens_split_over_messages() -> None:
    template = ChatTemplate(GLUED, {"eos_token": "<|eot_id|>"}, SPECIAL)
    dialog = turns("user: a<|eot", "assistant: _id|>b <|im_end ", "user: |>[INS", "assistant: T]")
    assert template.prompt(dialog) == [
        ("a<|eot_id|>b <|im_end|>[INST]", False),
        ("<|eot_id|>", True),
    ]


def test_a_template_still_sees_the_content() -> None:
    """Lengths, tests, splits and JSON are those of the content itself."""
    source = (
        "{% for m in messages %}{{ m.content|length }} {{ m.content.split('</t>')[-1] }} "
        "{{ m.content|tojson(ensure_ascii=True) }} {{ '|' in m.content }} {{ m.content|upper }}"
        "{% endfor %}"
    )
    template = ChatTemplate(source, {}, SPECIAL)
    [(text, special)] = template.prompt(turns('user: é</t>b|<|eot_id|>"\ue000'))
    content = 'é</t>b|<|eot_id|>"\ue000'
    assert not special
    assert text == (
        f'{len(content)} b|<|eot_id|>"\ue000 '
        '"\\u00e9</t>b|<|eot_id|>\\"\ue000" True É</T>B|<|EOT_ID|>"\ue000'
    )


def test_roles_that_a_template_lacks(tmp_path: Path) -> None:
    """A message that the template would leave out is refused."""
    write_hf_tokenizer(tmp_path, MODELS["allenai/Llama-3.1-Tulu-3-8B"])
    chat = ChatFormat(ours(tmp_path))
    assert chat.roles == ("system", "user", "assistant")
    with pytest.raises(ValueError, match="unknown role 'tool'"):
        chat.encode_dialog_prompt(CALLS[::2])
    with pytest.raises(ValueError, match="whole dialogs"):
        chat.encode_message({"role": "user", "content": "x"})


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{% for m in messages %}", "cannot write"),
        ("{{ raise_exception('never') }}", "never"),
        ("hello", "does not write the user's message"),
        ("{{ messages[0].content.__class__.__mro__ }}", "unsafe"),
        ("{{ messages[0].content|random }}", "No filter named 'random'"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}x{% endfor %}{% endfor %}", "work"),
    ],
)
def test_templates_that_cannot_be_used(source: str, match: str, tmp_path: Path) -> None:
    write_hf_tokenizer(tmp_path, ChatModel("llama-3"), chat_template=source)
    tokenizer = ours(tmp_path)
    assert tokenizer.chat_format == "template" and tokenizer.encode("x", bos=False, eos=False)
    with pytest.raises(ValueError, match=match):
        ChatFormat(tokenizer)


def test_templates_without_a_default(tmp_path: Path) -> None:
    named = [{"name": "x", "template": "{{ messages }}"}]
    write_hf_tokenizer(tmp_path, ChatModel("llama-3"), chat_template=named)
    with pytest.raises(
        ValueError, match=r"named \['x'\], and none named 'default'; rename one in "
    ):
        ChatFormat(ours(tmp_path))


class Large:
    def __str__(self) -> str:
        raise MemoryError


def test_a_template_that_needs_too_much_memory() -> None:
    with pytest.raises(ValueError, match="cannot write this: it needs more memory than there is; "):
        ChatTemplate("{{ x }}", {"x": Large()}, SPECIAL)  # type: ignore[dict-item]


def test_named_templates_in_files(tmp_path: Path) -> None:
    """Files win over the settings, as in transformers."""
    model = MODELS["NousResearch/Hermes-3-Llama-3.1-8B"]
    write_hf_tokenizer(tmp_path, model, chat_template="{{ messages }}")
    (tmp_path / "additional_chat_templates").mkdir()
    default, tools = (t["template"] for t in model.settings()["chat_template"])
    (tmp_path / "chat_template.jinja").write_text(default, "utf-8")
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(tools, "utf-8")
    chat, theirs = ChatFormat(ours(tmp_path)), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for dialog in DIALOGS:
        assert chat.encode_dialog_prompt(dialog) == apply(theirs, dialog)  # type: ignore[arg-type]
    found = chat.encode_dialog_prompt(CALLS, [TOOL])
    assert found == apply(theirs, theirs_calls(), [WRAPPED])


def test_calls_as_text_where_a_template_wants_it() -> None:
    source = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}"
        "{% endfor %}"
    )
    template = ChatTemplate(source, {}, SPECIAL)
    assert template.takes_calls and not template.takes_tools
    [(text, _)] = template.prompt(CALLS)
    assert 'get_weather{"city": "Ål \\"x\\"", "n": [1, null]}' in text
    printed = source.replace("name + c.function.arguments", "name ~ c.function.arguments")
    [(text, _)] = ChatTemplate(printed, {}, SPECIAL).prompt(CALLS)
    assert "'city'" not in text and '"city"' in text


def test_definitions_as_python_prints_them() -> None:
    source = "{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}"
    template = ChatTemplate(source, {}, SPECIAL)
    assert template.takes_tools and not template.takes_calls
    [(text, _)] = template.prompt(turns("user: Hi"), [TOOL])
    assert text == f"{[WRAPPED]}Hi"


def test_chatml_with_a_system_message_of_its_own(tmp_path: Path) -> None:
    source = (
        "{{ bos_token }}{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.\n"
        "Please.<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}<|im_start|>assistant\n"
    )
    source = source.replace("Please.<|im_end|>\n{%", "Please.<|im_end|>\n{{ '' }}{%")
    source = source.removesuffix("\n") + "{{ '\n' }}"
    write_hf_tokenizer(tmp_path, ChatModel("llama-3", eos=IM_END), chat_template=source)
    tokenizer, theirs = ours(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.chat_format, tokenizer.chat_bos) == ("chatml", BEGIN)
    assert tokenizer.default_system == "Be kind.\nPlease."
    for dialog in DIALOGS:
        assert ChatFormat(tokenizer).encode_dialog_prompt(dialog) == apply(theirs, dialog)  # type: ignore[arg-type]
