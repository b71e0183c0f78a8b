"""A checkpoint's chat templates -> what a sidecar says about chats. Knows tokens by name only.

A template is rendered in a sandbox, see `llama.text.template_sandbox`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama.checkpoints.formats.hf_tokenizer_import import read_settings
from llama.text.chat_formats import recognise
from llama.text.chat_template import TOOL, USER, ChatTemplate, turn

# Texts that templates write by name, such as `bos_token`.
NAMES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"


@dataclass(frozen=True)
class StoredTemplates:
    """The chat templates in a checkpoint's files.

    Attributes:
        sources: {name: Jinja source}; "default" is for all prompts, "tool_use" for those with
            tools.
        tokens: {"bos_token": its text or id, ...}.
        add_bos: chats begin with the vocabulary's begin token, whether the template writes it or
            not.
    """

    sources: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, str | int] = field(default_factory=dict)
    add_bos: bool = False


def read_hf_templates(folder: Path) -> StoredTemplates:
    """The templates of a Hugging Face folder: its .jinja files, or those in its settings.

    Raises:
        ValueError: a file is damaged.
    """
    settings = read_settings(folder)
    stored = settings.get("chat_template")
    named = stored if isinstance(stored, dict) else {"default": stored}
    try:
        if isinstance(stored, list):
            named = {template["name"]: template["template"] for template in stored}
    except (TypeError, KeyError):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: a chat_template in a list has a name and a "
            "template; download it again"
        ) from None
    files = {path.stem: path for path in (folder / TEMPLATE_FOLDER).glob("*.jinja")}
    if (folder / TEMPLATE_FILE).is_file():
        files["default"] = folder / TEMPLATE_FILE
    try:
        named = {name: path.read_text("utf-8") for name, path in files.items()} or named
    except UnicodeDecodeError as e:
        raise ValueError(f"{folder}: a chat template is not UTF-8 ({e}); download it again") from e
    texts = {name: settings.get(name) for name in NAMES}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in texts.items()}
    return StoredTemplates(
        _not_blank(named),
        {name: text for name, text in texts.items() if isinstance(text, str)},
    )


def read_gguf_templates(get: Callable[[str], Any]) -> StoredTemplates:
    """The templates of a GGUF file; `get` returns the value of a key, or None."""
    key = "tokenizer.chat_template"
    sources = {name: get(f"{key}.{name}") for name in get(f"{key}s") or ()} | {"default": get(key)}
    ids = {name: get(f"tokenizer.ggml.{name.replace('pad', 'padding')}_id") for name in NAMES}
    return StoredTemplates(
        _not_blank(sources),
        {name: i for name, i in ids.items() if isinstance(i, int)},
        add_bos=True,
    )


def _not_blank(sources: Mapping[str, Any]) -> dict[str, str]:
    """The sources that are texts and not empty."""
    return {name: text for name, text in sources.items() if isinstance(text, str) and text.strip()}


def chat_settings(stored: StoredTemplates, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a sidecar that say how chats are prompted (see `llama.tokenizer.Tokenizer`).

    A template that is the one of a built-in format, or of none, is kept for exports all the same.

    Args:
        spec: the other keys. The token that ends a turn is added to its `stop_tokens`.
    """
    special_tokens: dict[str, int] = spec["special_tokens"]
    text_of = {i: text for text, i in special_tokens.items()}
    tokens = {k: text_of.get(v) if isinstance(v, int) else v for k, v in stored.tokens.items()}
    texts = {name: text for name, text in tokens.items() if text is not None}
    bos = spec["bos_token"] if stored.add_bos and isinstance(spec["bos_token"], str) else None
    if not stored.sources:
        chatml = bos and bos != "<|im_start|>" and "<|im_start|>" in special_tokens
        return {"chat_bos": bos} if chatml else {}
    settings: dict[str, Any] = {"chat_format": "template", "template_tokens": texts}
    sources = dict(stored.sources)
    try:
        if bos:
            texts["bos_token"] = bos
            sources = {k: _with_begin(k, v, texts, special_tokens) for k, v in sources.items()}
        template = ChatTemplate(sources.get("default", ""), texts, special_tokens)
        end = template.turn_end()
        marks = template.turn_marks() | {end}
        in_text, flags = spec.get("text_tokens", {}), dict(spec.get("token_flags", {}))
        if marks & in_text.keys():
            settings["text_tokens"] = {k: v for k, v in in_text.items() if k not in marks}
            flags |= {k: v for k, v in in_text.items() if k in marks and v}
            settings |= {"token_flags": flags} if flags else {}
        chat_format, system, begin = recognise(template)
        if flags:  # no built-in format drops whitespace at its tokens
            chat_format, system, begin = "template", None, None
        settings |= {"chat_format": chat_format, "default_system": system}
        if "tool_use" in sources:  # no built-in format has a template of its own for tools
            settings |= {"chat_format": "template", "default_system": None}
        elif begin in special_tokens:
            settings["chat_bos"] = begin
        if end is not None and end not in spec["stop_tokens"]:
            settings["stop_tokens"] = [*spec["stop_tokens"], end]
    except ValueError:  # building a chat format says why
        pass
    return settings | {"chat_templates": sources}


def _with_begin(
    name: str, source: str, texts: Mapping[str, str], special: Mapping[str, int]
) -> str:
    """A template that writes the begin token; as it is if it writes it, or cannot be used."""
    for_tools = name == "tool_use"
    try:
        template = ChatTemplate(source, texts, special, for_tools)
        written = template.text([turn("user", USER)], [TOOL] if for_tools else None)
    except ValueError:
        return source
    return source if written.startswith(texts["bos_token"]) else "{{ bos_token }}" + source
