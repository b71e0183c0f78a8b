"""Parser of tool calls written as a Python list, `[f(a=1), g(b="x")]`. Evaluates no code.

Only single strings and numbers go to `ast.literal_eval`. `ast.parse` of a whole text could overflow
the C stack of a thread on deep nesting and crash the process.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any, TypeVar

from llama.text.tool_prompt import BUILTIN_TOOLS, MAX_DEPTH, ToolCall

T = TypeVar("T")

_TOKEN = re.compile(
    r"""\s*(?:(?P<string>("{3}|'{3}|["'])(?:\\.|(?!\2)[^\\])*\2)
          | (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)
          | (?P<name>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)
          | (?P<mark>[][(){},:=]))""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
_SEPARATOR = re.compile(r"[\s;,]*")
# Python's, and JSON's, which models write in Python lists too.
_CONSTANTS = {
    "True": True,
    "False": False,
    "None": None,
    "true": True,
    "false": False,
    "null": None,
}


def read_python_list(text: str) -> list[ToolCall]:
    """Parse one or several lists of calls. Arguments are keyword arguments with JSON-like literals.

    Raises:
        ValueError: `text` is anything else.
    """
    calls: list[ToolCall] = []
    tokens = _Parser(text)
    while tokens.at < len(text):
        tokens.take("mark", "[")
        calls.extend(tokens.items("]", tokens.call))
        tokens.at = _SEPARATOR.match(text, tokens.at).end()  # type: ignore[union-attr]  # matches ""
    return calls


def read_python_value(text: str, start: int) -> tuple[Any, int]:
    """The literal at `start`, such as `{'a': None}`, and its end.

    Raises:
        ValueError: there is anything else.
    """
    tokens = _Parser(text, start)
    return tokens.value(MAX_DEPTH + 2), tokens.at  # 2 levels more: the call and a list of calls


def dict_of_unique(pairs: list[tuple[str, T]]) -> dict[str, T]:
    """A dict of `pairs`; ValueError if a key occurs twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is given twice")
    return values


class _Parser:
    """Recursive-descent parser; `at` is the position of the next token."""

    def __init__(self, text: str, at: int = 0):
        self.text, self.at = text, at

    def next(self) -> tuple[str, str]:
        """Consume the next token; return its kind and text."""
        found = _TOKEN.match(self.text, self.at)
        if not found:
            raise ValueError(f"broken list of calls at {self.text[self.at :].strip():.20}")
        self.at = found.end()
        kind = found.lastgroup or ""
        return kind, found[kind]

    def take(self, kind: str, text: str | None = None) -> str:
        """Consume a token of this kind and text; return its text."""
        found_kind, found = self.next()
        if found_kind != kind or (text or found) != found:
            raise ValueError(f"broken list of calls: {found:.20} instead of a {text or kind}")
        return found

    def take_if_next(self, mark: str) -> bool:
        """Consume `mark` if it is the next token; return whether it was."""
        found = _TOKEN.match(self.text, self.at)
        if found and found["mark"] == mark:
            self.at = found.end()
            return True
        return False

    def items(self, close: str, read: Callable[[], T]) -> list[T]:
        """Items that `read` parses, separated by commas, up to `close`."""
        found: list[T] = []
        while not self.take_if_next(close):
            found.append(read())
            if not self.take_if_next(","):
                self.take("mark", close)
                break
        return found

    def call(self) -> ToolCall:
        name = self.take("name")
        if name.removesuffix(".call") in BUILTIN_TOOLS:
            name = name.removesuffix(".call")
        self.take("mark", "(")
        return {"name": name, "arguments": dict_of_unique(self.items(")", self.argument))}

    def argument(self) -> tuple[str, Any]:
        name = self.take("name")
        if "." in name:
            raise ValueError(f"broken list of calls: {name:.20} is not the name of an argument")
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
            return dict_of_unique(self.items("}", lambda: self.pair(depth - 1)))
        raise ValueError(f"{text:.20} is not a literal value")

    def pair(self, depth: int) -> tuple[str, Any]:
        key = _literal(self.take("string"))
        self.take("mark", ":")
        return key, self.value(depth)


def _literal(token: str) -> Any:
    """Value of a string or number. Unknown escapes keep their backslash, with no warning."""
    if token[0] in "\"'":
        known = "\n\\'\"abfnrtvxuUN0"
        token = re.sub(r"\\([\s\S])", lambda m: m[0] if m[1] in known else "\\" + m[0], token)
    try:
        value = ast.literal_eval(token)
    except (SyntaxError, ValueError):
        raise ValueError(f"{token:.40} is not a literal value") from None
    if isinstance(value, str):  # JSON writes one character over U+FFFF as two escapes
        value = value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    return value
