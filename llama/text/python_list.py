"""Python's `[f(a=1), g(b="x")]` -> tool calls. A reader of literals: nothing is evaluated.

`ast.literal_eval` sees single strings and numbers. Whole texts do not go to `ast.parse`: on the
small stack of a thread, deep nesting there ends the process instead of raising.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any, TypeVar

from llama.text.tool_prompt import MAX_DEPTH, ToolCall

T = TypeVar("T")

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>("{3}|'{3}|["'])(?:\\.|(?!\2)[^\\])*\2)
          | (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)
          | (?P<name>[A-Za-z_]\w*)
          | (?P<mark>[][(){},:=]))""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_GAP = re.compile(r"[\s;,]*")
_CONSTANTS = {"True": True, "False": False, "None": None}


def read_python_list(text: str) -> list[ToolCall]:
    """The calls of one list or several. Arguments are literals of JSON's types, by keyword.

    Raises:
        ValueError: it is anything else.
    """
    calls: list[ToolCall] = []
    tokens = _Tokens(text)
    while tokens.at < len(text):
        tokens.take("mark", "[")
        calls.extend(tokens.items("]", tokens.call))
        tokens.at = _GAP.match(text, tokens.at).end()  # type: ignore[union-attr]  # matches ""
    return calls


def unique(pairs: list[tuple[str, T]]) -> dict[str, T]:
    """A dict of pairs whose keys differ."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is given twice")
    return values


class _Tokens:
    """A list of calls, token by token."""

    def __init__(self, text: str):
        self.text, self.at = text, 0

    def next(self) -> tuple[str, str]:
        """The next token's kind and text."""
        found = _TOKEN.match(self.text, self.at)
        if not found:
            raise ValueError(f"broken list of calls at {self.text[self.at :].strip():.20}")
        self.at = found.end()
        kind = found.lastgroup or ""
        return kind, found[kind]

    def take(self, kind: str, text: str | None = None) -> str:
        got = self.next()
        if got[0] != kind or (text or got[1]) != got[1]:
            raise ValueError(f"broken list of calls: {got[1]:.20} where a {text or kind} belongs")
        return got[1]

    def comes(self, mark: str) -> bool:
        """Take `mark` if it is next."""
        found = _TOKEN.match(self.text, self.at)
        if found and found["mark"] == mark:
            self.at = found.end()
            return True
        return False

    def items(self, close: str, read: Callable[[], T]) -> list[T]:
        found: list[T] = []
        while not self.comes(close):
            found.append(read())
            if not self.comes(","):
                self.take("mark", close)
                break
        return found

    def call(self) -> ToolCall:
        name = self.take("name")
        self.take("mark", "(")
        return {"name": name, "arguments": unique(self.items(")", self.argument))}

    def argument(self) -> tuple[str, Any]:
        name = self.take("name")
        self.take("mark", "=")
        return name, self.value(MAX_DEPTH)

    def value(self, depth: int) -> Any:
        if depth < 0:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        kind, text = self.next()
        if kind in ("string", "number"):
            return _literal(text)
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if text == "[":
            return self.items("]", lambda: self.value(depth - 1))
        if text == "{":
            return unique(self.items("}", lambda: self.pair(depth - 1)))
        raise ValueError(f"{text:.20} is not a literal value")

    def pair(self, depth: int) -> tuple[str, Any]:
        key = _literal(self.take("string"))
        self.take("mark", ":")
        return key, self.value(depth)


def _literal(token: str) -> Any:
    """One string or number. Unknown escapes keep their backslash, as in Python, unwarned."""
    if token[0] in "\"'":
        known = "\n\\'\"abfnrtvxuUN0"
        token = re.sub(r"\\([\s\S])", lambda m: m[0] if m[1] in known else "\\" + m[0], token)
    try:
        return ast.literal_eval(token)
    except (SyntaxError, ValueError):
        raise ValueError(f"{token:.40} is not a literal value") from None
