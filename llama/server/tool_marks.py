"""Marks of tool calls in an answer's text, and what may become a call. Keeps no state of calls."""

from __future__ import annotations

import codecs
import dataclasses
import json
import re
from collections.abc import Sequence

from llama.text.tool_parser import PYTHON_TAG, ToolReply, parse_tool_calls
from llama.text.tool_prompt import BUILTIN_TOOLS
from llama.tokenizer import Tokenizer

# A tag is known by its id. `TAG` stands for it: a surrogate, which decoded text does not have.
# `_SPELLED` (with a code point that is no character) stands for ordinary text that looks like a
# tag, while the text is parsed.
TAG = "\udcff"
_SPELLED = "<\ufdd0|python_tag|>"
CODE = "code_interpreter"
FUNCTION, FUNCTION_END = "<function=", "</function>"
_ARGUMENTS = r'\{\s*["}]'  # others, such as {'a': 1}, are held
JSON_HEAD = re.compile(
    r'(\[\s*)?\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?("function"\s*:\s*\{\s*)?'
    rf'"name"\s*:\s*"([\w.-]{{1,64}})"\s*,\s*"(?:parameters|arguments)"\s*:\s*(?={_ARGUMENTS})',
    re.ASCII,
)
FUNCTION_HEAD = re.compile(rf"<function=([^<>\s]*)>\s*(?={_ARGUMENTS}|</function>)")
OBJECT = re.compile(r"\[?\s*(?=\{)")
_LIST = re.compile(r"\[\s*(?:\Z|[\]{]|[A-Za-z_][\w.]*\s*(?:\Z|\())", re.ASCII)
_BUILTIN = re.compile(rf"(?:{'|'.join(BUILTIN_TOOLS)})\.call\s*(?:\Z|\()")
_FENCE = re.compile(r"```[\w+-]*\s*")
CLOSE = re.compile(r"\s*,?\s*\}")
SEPARATORS = re.compile(rf"(?:[\s;,\]]|{TAG})*")


class TaggedText:
    """The text of an answer with `TAG` in place of each tag."""

    def __init__(self, tokenizer: Tokenizer):
        self._decode_bytes = tokenizer.decode_bytes
        self._tag_id = tokenizer.special_tokens.get(PYTHON_TAG)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoded = self._returned = 0  # characters
        self._tags: list[int] = []  # where those that follow begin
        self._held = ""  # received text that is not returned yet

    def feed(self, ids: Sequence[int], text: str, last: bool) -> str:
        for id in ids:
            self._decoded += len(self._utf8.decode(self._decode_bytes([id])))
            if id == self._tag_id:
                self._tags.append(self._decoded - len(PYTHON_TAG))
        self._held += text
        out = ""
        while self._tags and self._returned + len(self._held) >= self._tags[0] + len(PYTHON_TAG):
            out += self._take(self._tags.pop(0) - self._returned) + TAG
            self._take(len(PYTHON_TAG))
        if last or not self._tags:
            return out + self._take(len(self._held))
        return out + self._take(max(0, min(len(self._held), self._tags[0] - self._returned)))

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self._returned += length
        return text


def may_be_calls(text: str) -> bool:
    """Whether `text`, perhaps with more text after it, may be calls that are not streamed."""
    if text in ("`", "``"):
        return True
    if fence := _FENCE.match(text):
        text = text[fence.end() :]
        if not text or text[0] in f"`{{{TAG}" or FUNCTION.startswith(text[: len(FUNCTION)]):
            return True
    if _LIST.match(text) or _BUILTIN.match(text):
        return True
    return any(f"{name}.call".startswith(text) for name in BUILTIN_TOOLS)


def dump_arguments(value: object) -> str:
    """JSON; only what no text can hold is escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    text = text.replace(_SPELLED, PYTHON_TAG)
    return re.sub("[\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", text)


def parse_tagged(text: str) -> ToolReply:
    """`parse_tool_calls`, where only `TAG` is a tag."""
    reply = parse_tool_calls(text.replace(PYTHON_TAG, _SPELLED).replace(TAG, PYTHON_TAG))
    return dataclasses.replace(reply, content=reply.content.replace(_SPELLED, PYTHON_TAG))
