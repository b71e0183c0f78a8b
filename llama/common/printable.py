"""Text from files and models, made safe to print. Imports no torch.

Control characters move a terminal's cursor or change its settings, and bidirectional overrides
reorder what is shown. Both are written as backslash escapes.
"""

from __future__ import annotations

import json
import re
from typing import Any

# C0 but tab and line feed, DEL, C1, separators that end a line, bidirectional formatting, and
# surrogates, which no encoding has.
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: object) -> str:
    """`str(text)` with unsafe characters escaped: an escape character becomes `\\x1b`."""
    return UNSAFE.sub(_escape, str(text))


def printable_line(text: object) -> str:
    """`printable` on one line: line feeds are escaped too."""
    return printable(text).replace("\n", "\\n")


def as_json(value: Any, ascii_only: bool = False) -> str:
    """One line of JSON without unsafe characters."""
    text = json.dumps(value, ensure_ascii=ascii_only)
    return UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def encodable(text: str, encoding: str | None) -> str:
    """`text` with characters escaped that `encoding` lacks."""
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def quoted(value: object) -> str:
    """A value of JSON data in a message: short, and cheap to make also where it is long."""
    if isinstance(value, (list, dict)):
        return f"a JSON {'array' if isinstance(value, list) else 'object'}"
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of over 70 digits"
    if isinstance(value, str) and len(value) > 60:
        return json.dumps(value[:60] + "...")
    return json.dumps(value)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
