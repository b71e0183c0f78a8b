"""Copies the arguments of a tool call as valid JSON, character by character as they come."""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Iterable

from llama.text.tool_prompt import MAX_DEPTH

_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][-+]?\d+)?", re.ASCII)
_MAX_DIGITS = 600  # of a number; see `check_call`
# JSON's, and Python's, which models write too.
_CONSTANTS = {"true": "true", "false": "false", "null": "null"}
_CONSTANTS |= {"True": "true", "False": "false", "None": "null"}
_PYTHON_ESCAPES = "\n\r01234567avxUN"

Steps = Generator[None, str, str]


class ArgumentsReader:
    """Reads one JSON object; its text, without spaces, is what `feed` returns.

    As `parse_tool_calls`, it takes line breaks in strings, escapes that JSON lacks, Python's
    constants and commas before a closing bracket, and turns them into valid JSON.

    Attributes:
        done: the object is complete.
        failed: it is no such object.
    """

    def __init__(self) -> None:
        self.done = self.failed = False
        self._out: list[str] = []
        self._steps = self._object(MAX_DEPTH, top=True)
        next(self._steps)

    def feed(self, characters: Iterable[str]) -> tuple[str, int]:
        """Read up to the end of the object, to where it fails, or to the end of what is given.

        Returns:
            (valid JSON text, how many characters were read).
        """
        used = 0
        for character in characters:
            used += 1
            try:
                self._steps.send(character)
            except StopIteration:
                self.done = True
                break
            except ValueError:
                self.failed = True
                break
        out = "".join(self._out)
        self._out.clear()
        return out, used

    def _object(self, depth: int, top: bool = False) -> Steps:
        """An object, from the character before its first on where it is the top one."""
        if top and (yield) != "{":
            raise ValueError("no JSON object")
        self._out.append("{")
        keys: set[str] = set()
        c = yield from self._skip()
        while c != "}":
            self._out.append("," if keys else "")
            key = yield from self._string(c)
            if key in keys or (top and key.startswith("__")):
                raise ValueError(f"not the name of an argument, or given twice: {key:.80}")
            keys.add(key)
            if (yield from self._skip()) != ":":
                raise ValueError("a key without a value")
            self._out.append(":")
            c = yield from self._value((yield from self._skip()), depth - 1)
            if c == ",":
                c = yield from self._skip()
            elif c != "}":
                raise ValueError("no comma between two arguments")
        self._out.append("}")
        return c

    def _list(self, depth: int) -> Steps:
        self._out.append("[")
        c, between = (yield from self._skip()), ""
        while c != "]":
            self._out.append(between)
            between = ","
            c = yield from self._value(c, depth - 1)
            if c == ",":
                c = yield from self._skip()
            elif c != "]":
                raise ValueError("no comma between two items")
        self._out.append("]")
        return c

    def _value(self, c: str, depth: int) -> Steps:
        """A value that begins with `c`; returns the first character after it but spaces."""
        if depth < 0:
            raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
        if c == "{":
            yield from self._object(depth)
        elif c == "[":
            yield from self._list(depth)
        elif c == '"':
            yield from self._string(c)
        else:
            return (yield from self._word(c))
        return (yield from self._skip())

    def _word(self, c: str) -> Steps:
        """A number or constant."""
        word = ""
        while c not in " \t\r\n,]}":
            word += c
            if len(word) > _MAX_DIGITS:
                raise ValueError("a number of over 600 digits")
            c = yield
        if word in _CONSTANTS:
            word = _CONSTANTS[word]
        elif not _NUMBER.fullmatch(word) or abs(float(word)) == float("inf"):
            raise ValueError(f"{word:.40} is no JSON value")
        self._out.append(word)
        return c if c in ",]}" else (yield from self._skip())

    def _string(self, c: str) -> Steps:
        """A string that begins with the quote `c`; returns its value."""
        if c != '"':
            raise ValueError("no string in double quotes")
        written = ['"']
        self._out.append(c)
        while (c := (yield)) != '"':
            if c == "\\":
                c = yield from self._escape()
            elif c < " ":
                c = json.dumps(c)[1:-1]
            written.append(c)
            self._out.append(c)
        self._out.append('"')
        value = json.loads("".join(written) + '"')
        assert isinstance(value, str)
        return value

    def _escape(self) -> Steps:
        """The characters after a backslash, as JSON writes them."""
        c = yield
        if c == "u":
            code = ""
            while len(code) < 4:
                code += yield
            int(code if code.isalnum() else "", 16)  # raises a ValueError
            return f"\\u{code}"
        if c in _PYTHON_ESCAPES:
            raise ValueError(f"JSON has no escape \\{c}")
        if c == "'":
            return c
        return f"\\{c}" if c in '"\\/bfnrt' else f"\\\\{c}"

    def _skip(self) -> Steps:
        """The next character but spaces."""
        while (c := (yield)) in " \t\r\n":
            pass
        return c
