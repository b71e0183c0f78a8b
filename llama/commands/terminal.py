"""Text from and to a terminal or a pipe. Knows no verb."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

from llama.common.printable import as_json, printable

log = logging.getLogger("llama")


def print_text(text: str) -> None:
    """Print generated text on stdout at once, without a line end.

    A pipe gets the text as it is, a terminal without characters that move its cursor.
    """
    print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def print_report(text: object) -> None:
    """Print lines on stdout that may quote a file."""
    print(printable(text), flush=True)


def print_json(value: Any) -> None:
    """Print a line of JSON on stdout, valid in whatever encoding stdout has."""
    encoding = (sys.stdout.encoding or "utf-8").lower().replace("-", "").replace("_", "")
    print(as_json(value, ascii_only=encoding != "utf8"), flush=True)


def print_note(text: str) -> None:
    """Print a line on stderr; in a terminal dim, to look different from an answer."""
    text = printable(text)
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def print_remark(text: str) -> None:
    """`print_note` of something that --quiet leaves out."""
    if log.isEnabledFor(logging.WARNING):
        print_note(text)


def piped_lines() -> Iterator[str | ValueError]:
    """The lines of standard input; for a line that is not UTF-8 an error that says which."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as e:
            yield ValueError(
                f"line {number} of the input is not text in UTF-8 (byte {e.start + 1}); convert it "
                "with iconv"
            )
