"""Deltas of content and tool calls in OpenAI's form. Does not know how a model writes calls."""

from __future__ import annotations

import secrets
from typing import Any

Delta = dict[str, Any]


class DeltaWriter:
    """Collects the deltas of one answer.

    Attributes:
        begun: how many calls have begun.
        called: how many of them are complete.
        has_content: whether there was content.
        sent: the arguments of the last call so far.
    """

    def __init__(self) -> None:
        self.begun = self.called = 0
        self.has_content, self.sent = False, ""
        self._deltas: list[Delta] = []

    def take(self) -> list[Delta]:
        """The deltas since the last time."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def content(self, text: str) -> None:
        """Text outside of calls."""
        if not text:
            return
        self.has_content = True
        if self._deltas and "content" in self._deltas[-1]:
            self._deltas[-1]["content"] += text
        else:
            self._deltas.append({"content": text})

    def begin(self, name: str) -> None:
        """The head of the next call."""
        function = {"name": name, "arguments": ""}
        call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        self._deltas.append({"tool_calls": [{"index": self.begun} | call]})
        self.begun, self.sent = self.begun + 1, ""

    def arguments(self, text: str) -> None:
        """A part of the last call's arguments."""
        if text:
            self.sent += text
            part = {"index": self.begun - 1, "function": {"arguments": text}}
            self._deltas.append({"tool_calls": [part]})

    def complete(self, text: str = "") -> None:
        """The last part of the last call's arguments."""
        self.arguments(text)
        self.called += 1
