"""Which template prompts a checkpoint's chats, in each layout and after each verb.

Oracle: the text that transformers writes, encoded with its special tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from llama import ChatFormat, Llama, Tokenizer
from llama.checkpoints.convert import convert, quantize
from llama.checkpoints.formats.chat_settings import StoredTemplates, chat_settings
from llama.checkpoints.open import open_checkpoint, open_tokenizer
from tests.chat_models import (
    BEGIN,
    FIRST,
    IM_END,
    MODELS,
    SPECIAL,
    TOOL,
    ChatModel,
    vocabulary,
    write_hf_tokenizer,
)
from tests.checkpoints.gguf_files import vocabulary_keys, weights, write_gguf

DIALOG: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "What's 12 + 6?"},
]
NAMES = [
    "meta-llama/Meta-Llama-3-8B-Instruct",
    "allenai/Llama-3.1-Tulu-3-8B",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "teknium/Hermes-2-Pro, its default template",
    "NousResearch/Hermes-3-Llama-3.1-8B",
]


def write_rank_file(folder: Path) -> None:
    ranks, sidecar = vocabulary()
    (folder / "tokenizer.model").write_bytes(ranks)
    (folder / "tokenizer.model.json").write_text(json.dumps(sidecar))


def gguf_keys(model: ChatModel) -> dict[str, Any]:
    special = {text: 497 + i for i, text in enumerate(SPECIAL)}
    template = model.settings()["chat_template"]
    named = {"default": template} if isinstance(template, str) else {}
    named = named or {t["name"]: t["template"] for t in template}
    keys = vocabulary_keys("llama-bpe", special) | {"tokenizer.chat_template": named.pop("default")}
    if named:
        keys["tokenizer.chat_templates"] = list(named)
        keys |= {f"tokenizer.chat_template.{name}": text for name, text in named.items()}
    keys["tokenizer.ggml.bos_token_id"] = special[model.bos]
    return keys | {"tokenizer.ggml.eos_token_id": special[model.eos]}


@pytest.fixture(scope="module", params=NAMES)
def layouts(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[ChatModel, dict[str, Path]]:
    """(a published model, {layout: a tiny checkpoint with its template})."""
    model, tmp = MODELS[request.param], tmp_path_factory.mktemp("layouts")
    base = tiny_checkpoint(vocab_size=FIRST + len(SPECIAL))
    write_rank_file(base)
    hf = convert(base, tmp / "hf", to="hf")
    write_hf_tokenizer(hf, model)
    tensors: dict[str, np.ndarray] = weights(vocab=497 + len(SPECIAL))
    gguf = write_gguf(tmp / "m.gguf", tensors, gguf_keys(model))
    meta = convert(hf, tmp / "meta")
    from_gguf = convert(gguf, tmp / "from_gguf")
    return model, {
        "hf": hf,
        "meta": meta,
        "quantized": quantize(hf, tmp / "quantized", "int8"),
        "exported": convert(meta, tmp / "exported", to="hf"),
        "gguf": gguf,
        "gguf to meta": from_gguf,
        "gguf to hf": convert(from_gguf, tmp / "gguf_to_hf", to="hf"),
    }


def expected(theirs: Any, tokenizer: Tokenizer, bos: str = "", tools: Any = None) -> list[int]:
    text = theirs.apply_chat_template(
        DIALOG, tools=tools, tokenize=False, add_generation_prompt=True
    )
    text = text if text.startswith(bos) else bos + text
    return tokenizer.encode(text, bos=False, eos=False, allowed_special="all")


@pytest.mark.parametrize(
    "layout", ["hf", "meta", "quantized", "exported", "gguf", "gguf to meta", "gguf to hf"]
)
def test_prompts_of_layouts(
    layout: str,
    layouts: tuple[ChatModel, dict[str, Path]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A GGUF file of Llama 3 says that prompts begin with the begin token."""
    model, folders = layouts
    theirs = transformers.AutoTokenizer.from_pretrained(folders["hf"])
    with caplog.at_level(logging.INFO, "llama"):
        llama = Llama.build(folders[layout], None, 1024, 1, device="cpu")
    with llama:
        bos = model.bos if "gguf" in layout else ""
        ids = expected(theirs, llama.tokenizer, bos)
        with llama.chat_stream(DIALOG) as stream:
            assert list(stream.request.prompt) == ids
            assert model.end is not None
            assert llama.tokenizer.special_tokens[model.end] in stream.request.stop_tokens
        if model.tool_use:
            ids = expected(theirs, llama.tokenizer, bos, [{"type": "function", "function": TOOL}])
            with llama.chat_stream(DIALOG, [TOOL]) as stream:
                assert list(stream.request.prompt) == ids
        assert llama.formatter is not None
        assert f"Chat format: {llama.formatter.description}" in caplog.messages


def test_exports_keep_the_template(layouts: tuple[ChatModel, dict[str, Path]]) -> None:
    model, folders = layouts
    for layout in ("exported", "gguf to hf"):
        theirs = transformers.AutoTokenizer.from_pretrained(folders[layout])
        tokenizer = open_tokenizer(open_checkpoint(folders[layout]))
        found = theirs.apply_chat_template(DIALOG, add_generation_prompt=True, return_dict=False)
        assert found == ChatFormat(tokenizer).encode_dialog_prompt(DIALOG)
        settings = json.loads((folders[layout] / "tokenizer_config.json").read_text("utf-8"))
        if layout == "exported":
            assert settings["chat_template"] == model.settings()["chat_template"]
            assert {k: settings[k] for k in model.settings()} == model.settings()


def test_a_rank_file_in_a_hugging_face_folder(
    tiny_checkpoint: Callable[..., Path], byte_tokenizer_path: Path, tmp_path: Path
) -> None:
    """The template decides beside a rank file like Meta's, also where its path is given."""
    base = tiny_checkpoint(vocab_size=512)
    (base / "tokenizer.model").write_bytes(byte_tokenizer_path.read_bytes())
    hf = convert(base, tmp_path / "hf", to="hf")
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (hf / name).unlink()
    settings = MODELS["allenai/Llama-3.1-Tulu-3-8B"].settings()
    (hf / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    (hf / "tokenizer.model").write_bytes(byte_tokenizer_path.read_bytes())
    for path in (None, hf / "tokenizer.model"):
        tokenizer = open_tokenizer(open_checkpoint(hf), path)
        ids = ChatFormat(tokenizer).encode_dialog_prompt(DIALOG)
        assert tokenizer.decode(ids).startswith("<|system|>\nBe brief.\n<|user|>\nHi\n")


CHATML = MODELS["cognitivecomputations/dolphin-2.9-llama3-8b"].settings()["chat_template"]


@pytest.mark.parametrize(
    ("sources", "add_bos", "chat_format", "bos"),
    [
        ({}, False, None, None),
        ({}, True, None, BEGIN),
        ({"default": CHATML}, False, "chatml", None),
        ({"default": CHATML}, True, "chatml", BEGIN),
        ({"default": "{{ bos_token }}" + CHATML}, True, "chatml", BEGIN),
        ({"default": "{{ bos_token }}" + CHATML}, False, "chatml", BEGIN),
        ({"rag": CHATML}, False, "template", None),
        ({"default": CHATML, "rag": CHATML}, False, "chatml", None),
        ({"default": CHATML, "tool_use": CHATML}, False, "template", None),
    ],
)
def test_begin_token_of_chatml(
    sources: dict[str, str], add_bos: bool, chat_format: str | None, bos: str | None
) -> None:
    spec = vocabulary()[1]
    stored = StoredTemplates(sources, {"bos_token": BEGIN, "eos_token": IM_END}, add_bos)
    found = chat_settings(stored, spec)
    assert (found.get("chat_format"), found.get("chat_bos")) == (chat_format, bos)


@pytest.mark.parametrize("head", ["", "{{ bos_token }}"])
def test_begin_token_of_gguf_templates_for_tools(head: str) -> None:
    """One begin token, whichever of the templates writes it."""
    ranks, spec = vocabulary()
    with_tools = head + "{{ tools|tojson }}" + CHATML
    stored = StoredTemplates(
        {"default": CHATML, "tool_use": with_tools}, {"bos_token": BEGIN}, True
    )
    chat = ChatFormat(Tokenizer.from_vocabulary(ranks, spec | chat_settings(stored, spec), "test"))
    for tools in (None, [TOOL]):
        ids = chat.encode_dialog_prompt(DIALOG, tools)
        begin = chat.tokenizer.special_tokens[BEGIN]
        assert ids[0] == begin and ids.count(begin) == 1
