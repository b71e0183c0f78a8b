"""An answer's ids and text, as they come -> OpenAI's deltas of content and tool calls.

Reads what `parse_tool_calls` reads. Arguments in JSON are passed on as they come; Python lists,
built-in calls and fenced blocks are held until the answer ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence

from llama.engine.request import FinishReason
from llama.server.tool_arguments import ArgumentsReader
from llama.server.tool_deltas import Delta, DeltaWriter
from llama.server.tool_marks import (
    CLOSE,
    CODE,
    FUNCTION,
    FUNCTION_END,
    FUNCTION_HEAD,
    JSON_HEAD,
    OBJECT,
    SEPARATORS,
    TAG,
    TaggedText,
    dump_arguments,
    may_be_calls,
    parse_tagged,
)
from llama.text.detokenizer import overlap
from llama.text.tool_parser import PYTHON_TAG
from llama.tokenizer import Tokenizer


class ToolStream:
    """The deltas of one answer; they depend on its text and ids, not on how `feed` gets them.

    A call begins when its name is complete and is one of `names`: a call of any other tool is
    content, with all that follows it. So is text that proves to be no call. What has begun to be
    sent cannot be taken back: a call that breaks later keeps incomplete arguments, and its whole
    text follows as content.

    Args:
        names: the tools that the request offers.
        parallel: whether there may be several calls; otherwise those after the first are dropped.
    """

    def __init__(self, tokenizer: Tokenizer, names: Collection[str], *, parallel: bool = True):
        self._names, self._parallel = names, parallel
        self._input = TaggedText(tokenizer)
        self._out = DeltaWriter()
        self._text = ""  # what has become neither content nor a complete call
        self._first = 0  # where in `_text` the calls begin: after spaces and a tag
        self._at = 0  # how much of `_text` has been read
        self._tagged = False  # `_text` has a tag before `_first`
        self._functions = False  # `<function=` came first: tags are text
        self._open: re.Match[str] | None = None  # the head of a JSON call that has begun
        self._closed = False  # the call in `_open` has all its brackets
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
        return self._out.take()

    @property
    def called(self) -> int:
        """How many calls are complete."""
        return self._out.called

    # The states. Each reads `_text` and returns whether to go on with another state at once.

    def _start(self, reason: FinishReason | None) -> bool:
        """The beginning of the answer, or what follows a tag."""
        text = self._text
        self._first = len(text) - len(text[self._first :].lstrip())
        if head := JSON_HEAD.match(text, self._first):
            return self._json_call(head)
        if found := OBJECT.match(text, self._first):
            self._at, self._reader = found.end(), ArgumentsReader()
            return self._to(self._object)
        if self._tagged and text.startswith(FUNCTION, self._first):
            self._at = self._first
            return self._to(self._function)
        if self._tagged and not SEPARATORS.sub("", text[self._first :]):
            return self._hold(reason)
        begun = text[self._first :]
        if begun and not may_be_calls(begun) and not (self._tagged and FUNCTION.startswith(begun)):
            return self._to(self._code if self._tagged else self._prose)
        return self._hold(reason)

    def _object(self, reason: FinishReason | None) -> bool:
        """A JSON object that may be a call."""
        if head := JSON_HEAD.match(self._text, self._first):
            return self._json_call(head)
        self._at += self._reader.feed(self._text[self._at :])[1]
        if self._reader.failed:
            return self._to(self._hold)
        if self._reader.done:
            start = OBJECT.match(self._text, self._first)
            assert start
            may_be_call = (
                self._tagged or parse_tagged(self._text[start.end() : self._at]).tool_calls
            )
            return self._to(self._hold if may_be_call else self._prose)
        return self._hold(reason)

    def _hold(self, reason: FinishReason | None) -> bool:
        """The whole text decides."""
        if reason is not None:
            self._finish(reason)
        return False

    def _prose(self, reason: FinishReason | None) -> bool:
        """Text in which calls may follow. Spaces beside calls are dropped."""
        if self._out.begun and not self._out.has_content:
            self._text = self._text.lstrip()
        text = self._text
        found = [text.find(FUNCTION), -1 if self._functions else text.find(TAG)]
        cut = min((at for at in found if at >= 0), default=None)
        if cut is None and reason is not None:
            self._text = ""
            self._content(text.rstrip() if self._out.begun else text)
            return False
        end = len(text) - overlap(text, FUNCTION) if cut is None else cut
        length = len(text[:end].rstrip())
        self._content(text[:length])
        self._text = text[length:]
        if cut is None:
            return False
        self._at = cut - length
        if self._text[self._at] == TAG:
            self._tagged, self._first = True, self._at + 1
            return self._to(self._start)
        return self._to(self._function)

    def _function(self, reason: FinishReason | None) -> bool:
        """At `<function=`."""
        self._functions = True
        head = FUNCTION_HEAD.match(self._text, self._at)
        if not head:
            return self._hold(reason)
        if head[1] not in self._names:
            return self._to(self._content_only)
        self._first, self._at = self._at, head.end()
        self._begin(head[1])
        if self._text.startswith(FUNCTION_END, self._at):
            self._out.arguments("{}")
            return self._function_complete()
        return self._to(self._arguments)

    def _json_call(self, head: re.Match[str]) -> bool:
        """The head of a call in JSON."""
        if head[3] not in self._names:
            return self._to(self._content_only)
        self._open, self._closed, self._at = head, False, head.end()
        self._begin(head[3])
        return self._to(self._arguments)

    def _arguments(self, reason: FinishReason | None) -> bool:
        """The arguments of a call that has begun."""
        characters = (PYTHON_TAG if c == TAG else c for c in self._text[self._at :])
        text, used = self._reader.feed(characters)
        self._at += used
        if not self._reader.done:
            self._out.arguments(text)
            broken = self._reader.failed or reason == "stop"
            return broken and self._to(self._content_only)
        if self._functions:
            self._out.arguments(text)
            return self._function_complete()
        self._out.arguments(text[:-1])  # the last bracket, once the call is complete
        return self._to(self._json_tail)

    def _json_tail(self, reason: FinishReason | None) -> bool:
        """After the arguments in JSON: the end of the call, and perhaps another call."""
        text, end = self._text, self._at
        assert self._open
        for _ in range(2 if self._open[2] else 1):
            close = CLOSE.match(text, end)
            if not close:
                return self._hold(reason)
            end = close.end()
        self._closed = True
        separators = SEPARATORS.match(text, end)
        assert separators
        if separators.end() == len(text):
            return self._hold(reason)
        head = JSON_HEAD.match(text, separators.end())
        if not head:
            may_be_call = text[separators.end()] in "[{"
            return self._hold(reason) if may_be_call else self._to(self._content_only)
        self._out.complete("}")
        in_list = (self._prefix or self._open[1]) and "]" not in separators[0]
        self._prefix = "[" if in_list else ""
        self._text, self._open, self._closed = text[head.start() :], None, False
        if not self._parallel:
            return self._to(self._drop)
        head = JSON_HEAD.match(self._text)
        assert head
        return self._json_call(head)

    def _function_complete(self) -> bool:
        self._out.complete()
        before = self._text[: self._first].replace(TAG, "")
        self._text, self._at = before + self._text[self._at :], len(before)
        return self._to(self._function_end if self._parallel else self._drop)

    def _function_end(self, reason: FinishReason | None) -> bool:
        """After the arguments of `<function=name>`: `</function>`, which may be missing."""
        rest = self._text[self._at :].lstrip()
        if rest != FUNCTION_END and FUNCTION_END.startswith(rest) and reason != "stop":
            return False
        if rest.startswith(FUNCTION_END):
            self._text = self._text[: self._at] + rest.removeprefix(FUNCTION_END)
        return self._to(self._prose)

    def _code(self, reason: FinishReason | None) -> bool:
        """Code after a tag."""
        if CODE not in self._names:
            return self._to(self._content_only)
        if not self._open_code:
            self._open_code = True
            self._out.begin(CODE)
            self._out.arguments('{"code":"')
            self._text = self._text.partition(TAG)[2]
        self._out.arguments(dump_arguments(self._text.replace(TAG, PYTHON_TAG))[1:-1])
        self._text = ""
        if reason == "stop":
            self._out.complete('"}')
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

    def _begin(self, name: str) -> None:
        self._out.begin(name)
        self._reader = ArgumentsReader()

    def _content(self, text: str) -> None:
        self._out.content(text.replace(TAG, PYTHON_TAG))

    def _to(self, state: Callable[[FinishReason | None], bool]) -> bool:
        self._state = state
        return True

    def _finish(self, reason: FinishReason) -> None:
        """The answer has ended while its calls were undecided."""
        guard = "." if self._functions and self._out.has_content else ""  # keeps spaces after it
        reply = parse_tagged(guard + self._prefix + self._text)
        calls = reply.tool_calls if self._parallel else reply.tool_calls[:1]
        if not calls or any(call["name"] not in self._names for call in calls):
            calls = []
        if self._open and calls:  # `calls` may differ, by a key after the arguments
            sent = dump_arguments(json.loads(self._out.sent + "}"))
            calls = calls if sent == dump_arguments(calls[0]["arguments"]) else []
        if not calls:
            if reason == "stop" or not self._out.begun:
                self._content(self._text)
            elif self._closed:  # what follows the call was cut off
                self._out.complete("}")
            return
        self._out.content(reply.content.removeprefix(guard))
        if self._open:
            self._out.complete("}")
        for call in calls[1 if self._open else 0 :]:
            self._out.begin(call["name"])
            self._out.complete(dump_arguments(call["arguments"]))
