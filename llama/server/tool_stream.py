"""An answer's ids and text, as they come -> OpenAI's deltas of content and tool calls.

Reads what `parse_tool_calls` reads. Arguments in JSON are passed on as they come; Python lists,
built-in calls and fenced blocks are held until the answer ends.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
from collections.abc import Callable, Collection, Sequence
from typing import Any

from llama.engine.request import FinishReason
from llama.server.tool_arguments import ArgumentsReader
from llama.text.detokenizer import overlap
from llama.text.tool_parser import PYTHON_TAG, ToolReply, parse_tool_calls
from llama.text.tool_prompt import BUILTIN_TOOLS
from llama.tokenizer import Tokenizer

Delta = dict[str, Any]

# Surrogates do not occur in decoded text. A tag is known by its id: `_TAG` stands for it, and
# `_SPELLED`, while the text is parsed, for ordinary text that looks like one.
_TAG = "\udcff"
_SPELLED = "<\udcfe|python_tag|>"
CODE = "code_interpreter"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_ARGUMENTS = r'\{\s*["}]'  # others, such as {'a': 1}, are held
_JSON_HEAD = re.compile(
    r'(\[\s*)?\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?("function"\s*:\s*\{\s*)?'
    rf'"name"\s*:\s*"([\w.-]{{1,64}})"\s*,\s*"(?:parameters|arguments)"\s*:\s*(?={_ARGUMENTS})',
    re.ASCII,
)
_FUNCTION_HEAD = re.compile(rf"<function=([^<>\s]*)>\s*(?={_ARGUMENTS}|</function>)")
_OBJECT = re.compile(r"\[?\s*(?=\{)")
_LIST = re.compile(r"\[\s*(?:\Z|[\]{]|[A-Za-z_][\w.]*\s*(?:\Z|\())", re.ASCII)
_BUILTIN = re.compile(rf"(?:{'|'.join(BUILTIN_TOOLS)})\.call\s*(?:\Z|\()")
_FENCE = re.compile(r"```[\w+-]*\s*")
_CLOSE = re.compile(r"\s*,?\s*\}")
_SEPARATORS = re.compile(rf"(?:[\s;,\]]|{_TAG})*")


class ToolStream:
    """The deltas of one answer; they depend on its text and ids, not on how `feed` gets them.

    A call begins when its name is complete and is one of `names`: a call of any other tool is
    content, with all that follows it. So is text that proves to be no call. What has begun to be
    sent cannot be taken back: a call that breaks later keeps incomplete arguments, and its whole
    text follows as content.

    Args:
        names: the tools that the request offers.
        parallel: whether there may be several calls; otherwise those after the first are dropped.

    Attributes:
        called: how many calls are complete.
    """

    def __init__(self, tokenizer: Tokenizer, names: Collection[str], *, parallel: bool = True):
        self.called = 0
        self._names, self._parallel = names, parallel
        self._input = _TaggedText(tokenizer)
        self._deltas: list[Delta] = []
        self._begun = 0  # calls
        self._has_content = False
        self._text = ""  # what has become neither content nor a complete call
        self._first = 0  # where in `_text` the calls begin: after spaces and a tag
        self._at = 0  # how much of `_text` has been read
        self._tagged = False  # `_text` has a tag before `_first`
        self._functions = False  # `<function=` came first: tags are text
        self._open: re.Match[str] | None = None  # the head of a JSON call that has begun
        self._open_code = False
        self._prefix = ""  # "[" where `_text` begins inside a list of JSON calls
        self._reader = ArgumentsReader()
        self._state: Callable[[FinishReason | None], bool] = self._start

    def feed(
        self, ids: Sequence[int], text: str, reason: FinishReason | None = None
    ) -> list[Delta]:
        """The deltas that are certain now.

        Args:
            ids: the new ids.
            text: the new text of these and earlier ids, as a `Piece` has them.
            reason: why the answer has ended, in its last piece.

        Returns:
            {"content": text} and {"tool_calls": [a call, or a part of its arguments]}, in order.
        """
        self._text += self._input.feed(ids, text, last=reason is not None)
        while self._state(reason):
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    # The states. Each reads `_text` and returns whether to go on with another state at once.

    def _start(self, reason: FinishReason | None) -> bool:
        """The beginning of the answer, or what follows a tag."""
        text = self._text
        self._first = len(text) - len(text[self._first :].lstrip())
        if head := _JSON_HEAD.match(text, self._first):
            return self._json_call(head)
        if found := _OBJECT.match(text, self._first):
            self._at, self._reader = found.end(), ArgumentsReader()
            return self._to(self._object)
        if self._tagged and text.startswith(_FUNCTION, self._first):
            self._at = self._first
            return self._to(self._function)
        begun = text[self._first :]
        if (
            begun
            and not _may_be_calls(begun)
            and not (self._tagged and _FUNCTION.startswith(begun))
        ):
            return self._to(self._code if self._tagged else self._prose)
        return self._hold(reason)

    def _object(self, reason: FinishReason | None) -> bool:
        """A JSON object that may be a call."""
        if head := _JSON_HEAD.match(self._text, self._first):
            return self._json_call(head)
        try:
            self._at += self._reader.feed(self._text[self._at :])[1]
        except ValueError:
            return self._to(self._hold)
        if self._reader.done:
            start = _OBJECT.match(self._text, self._first)
            assert start
            may_be_call = self._tagged or self._parse(self._text[start.end() : self._at]).tool_calls
            return self._to(self._hold if may_be_call else self._prose)
        return self._hold(reason)

    def _hold(self, reason: FinishReason | None) -> bool:
        """The whole text decides."""
        if reason is not None:
            self._finish()
        return False

    def _prose(self, reason: FinishReason | None) -> bool:
        """Text in which calls may follow. Spaces beside calls are dropped."""
        text = self._text
        found = [text.find(_FUNCTION), -1 if self._functions else text.find(_TAG)]
        cut = min((at for at in found if at >= 0), default=None)
        if cut is None and reason is not None:
            self._text = ""
            self._content(text.rstrip() if self._begun else text)
            return False
        end = len(text) - overlap(text, _FUNCTION) if cut is None else cut
        length = len(text[:end].rstrip())
        self._content(text[:length])
        self._text = text[length:]
        if cut is None:
            return False
        self._at = cut - length
        if self._text[self._at] == _TAG:
            self._tagged, self._first = True, self._at + 1
            return self._to(self._start)
        return self._to(self._function)

    def _function(self, reason: FinishReason | None) -> bool:
        """At `<function=`."""
        self._functions = True
        head = _FUNCTION_HEAD.match(self._text, self._at)
        if not head:
            return self._hold(reason)
        if head[1] not in self._names:
            return self._to(self._content_only)
        self._first, self._at = self._at, head.end()
        self._begin(head[1])
        if self._text.startswith(_FUNCTION_END, self._at):
            self._send_arguments("{}")
            return self._function_complete()
        return self._to(self._arguments)

    def _json_call(self, head: re.Match[str]) -> bool:
        """The head of a call in JSON."""
        if head[3] not in self._names:
            return self._to(self._content_only)
        self._open, self._at = head, head.end()
        self._begin(head[3])
        return self._to(self._arguments)

    def _arguments(self, reason: FinishReason | None) -> bool:
        """The arguments of a call that has begun."""
        characters = (PYTHON_TAG if c == _TAG else c for c in self._text[self._at :])
        try:
            text, used = self._reader.feed(characters)
        except ValueError:
            return self._to(self._content_only)
        self._at += used
        if not self._reader.done:
            self._send_arguments(text)
            return reason == "stop" and self._to(self._content_only)
        if self._functions:
            self._send_arguments(text)
            return self._function_complete()
        self._send_arguments(text[:-1])  # the last bracket, once the call is complete
        return self._to(self._json_tail)

    def _json_tail(self, reason: FinishReason | None) -> bool:
        """After the arguments in JSON: the end of the call, and perhaps another call."""
        text, end = self._text, self._at
        assert self._open
        for _ in range(2 if self._open[2] else 1):
            close = _CLOSE.match(text, end)
            if not close:
                return self._hold(reason)
            end = close.end()
        separators = _SEPARATORS.match(text, end)
        assert separators
        if separators.end() == len(text):
            return self._hold(reason)
        head = _JSON_HEAD.match(text, separators.end())
        if not head:
            may_be_call = text[separators.end()] in "[{"
            return self._hold(reason) if may_be_call else self._to(self._content_only)
        self._complete("}")
        in_list = (self._prefix or self._open[1]) and "]" not in separators[0]
        self._prefix = "[" if in_list else ""
        self._text, self._open = text[head.start() :], None
        if not self._parallel:
            return self._to(self._drop)
        head = _JSON_HEAD.match(self._text)
        assert head
        return self._json_call(head)

    def _function_complete(self) -> bool:
        self._complete()
        before = self._text[: self._first].replace(_TAG, "")
        self._text, self._at = before + self._text[self._at :], len(before)
        return self._to(self._function_end if self._parallel else self._drop)

    def _function_end(self, reason: FinishReason | None) -> bool:
        """After the arguments of `<function=name>`: `</function>`, which may be missing."""
        rest = self._text[self._at :].lstrip()
        if reason is None and len(rest) < len(_FUNCTION_END) and _FUNCTION_END.startswith(rest):
            return False
        if rest.startswith(_FUNCTION_END):
            self._text = self._text[: self._at] + rest.removeprefix(_FUNCTION_END)
        return self._to(self._prose)

    def _code(self, reason: FinishReason | None) -> bool:
        """Code after a tag."""
        if CODE not in self._names:
            return self._to(self._content_only)
        if not self._open_code:
            self._open_code = True
            self._begin(CODE)
            self._send_arguments('{"code":"')
            self._text = self._text.partition(_TAG)[2]
        self._send_arguments(_dump(self._text.replace(_TAG, PYTHON_TAG))[1:-1])
        self._text = ""
        if reason == "stop":
            self._complete('"}')
        return False

    def _content_only(self, reason: FinishReason | None) -> bool:
        """Nothing that follows is a call."""
        self._content(self._text)
        self._text = ""
        return False

    def _drop(self, reason: FinishReason | None) -> bool:
        """After the only call that is allowed."""
        self._text = ""
        return False

    def _to(self, state: Callable[[FinishReason | None], bool]) -> bool:
        self._state = state
        return True

    def _finish(self) -> None:
        """The answer has ended while its calls were undecided."""
        reply = self._parse(self._prefix + self._text)
        calls = reply.tool_calls if self._parallel else reply.tool_calls[:1]
        if not calls or any(call["name"] not in self._names for call in calls):
            self._content(self._text)
            return
        self._content(reply.content.replace(_SPELLED, PYTHON_TAG))
        if self._open:
            self._complete("}")
        for call in calls[1 if self._open else 0 :]:
            self._begin(call["name"])
            self._complete(_dump(call["arguments"]))

    def _parse(self, text: str) -> ToolReply:
        return parse_tool_calls(text.replace(PYTHON_TAG, _SPELLED).replace(_TAG, PYTHON_TAG))

    # Deltas.

    def _content(self, text: str) -> None:
        if self._begun and not self._has_content:
            text = text.lstrip()
        if not text:
            return
        self._has_content = True
        text = text.replace(_TAG, PYTHON_TAG)
        if self._deltas and "content" in self._deltas[-1]:
            self._deltas[-1]["content"] += text
        else:
            self._deltas.append({"content": text})

    def _begin(self, name: str) -> None:
        function = {"name": name, "arguments": ""}
        call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        self._deltas.append({"tool_calls": [{"index": self._begun} | call]})
        self._begun += 1
        self._reader = ArgumentsReader()

    def _send_arguments(self, text: str) -> None:
        if text:
            part = {"index": self._begun - 1, "function": {"arguments": text}}
            self._deltas.append({"tool_calls": [part]})

    def _complete(self, text: str = "") -> None:
        self._send_arguments(text)
        self.called += 1


class _TaggedText:
    """The text of an answer with `_TAG` in place of each tag."""

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
            out += self._take(self._tags.pop(0) - self._returned) + _TAG
            self._take(len(PYTHON_TAG))
        if last or not self._tags:
            return out + self._take(len(self._held))
        return out + self._take(max(0, min(len(self._held), self._tags[0] - self._returned)))

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self._returned += length
        return text


def _may_be_calls(text: str) -> bool:
    """Whether `text`, perhaps with more text after it, may be calls that are not streamed."""
    if text in ("`", "``"):
        return True
    if fence := _FENCE.match(text):
        text = text[fence.end() :]
        if not text or text[0] in f"`{{{_TAG}" or _FUNCTION.startswith(text[: len(_FUNCTION)]):
            return True
    if _LIST.match(text) or _BUILTIN.match(text):
        return True
    return any(f"{name}.call".startswith(text) for name in BUILTIN_TOOLS)


def _dump(value: object) -> str:
    """JSON; only what no text can hold is escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    text = text.replace(_SPELLED, PYTHON_TAG)
    return re.sub("[\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", text)
