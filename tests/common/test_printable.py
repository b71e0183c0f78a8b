"""printable.py: text that may come from anybody, on a terminal, in JSON, in other encodings."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.common.printable import as_json, encodable, printable, printable_line

OVERRIDES = [chr(c) for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))]


def test_nothing_that_moves_the_cursor_or_reorders_is_left() -> None:
    """Against Unicode's own table: every control character, and every explicit direction."""
    everything = "".join(map(chr, range(0x110000)))
    left = set(printable(everything))
    for character in map(chr, range(0x3000)):
        control = unicodedata.category(character) == "Cc" and character not in "\n\t"
        forced = unicodedata.bidirectional(character) in (
            "LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI",
        )  # fmt: skip
        assert (character not in left) == (control or forced or character in "\u2028\u2029")
    assert printable("a\x1b[2J\x9b\u202eb\ud800") == r"a\x1b[2J\x9b\u202eb\ud800"
    assert printable("naïve שלום 日本 👩\u200d🔬\n\t") == "naïve שלום 日本 👩\u200d🔬\n\t"
    assert printable_line("a\nb") == r"a\nb"


@given(st.text())
def test_json_is_the_same_value(text: str) -> None:
    for ascii_only in (False, True):
        line = as_json({"text": text}, ascii_only)
        assert json.loads(line) == {"text": text} and printable_line(line) == line
    assert as_json(text, ascii_only=True).isascii()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8", None])
def test_every_encoding_can_show_it(encoding: str | None) -> None:
    text = encodable("é 日 \ud800", encoding)
    assert text.encode(encoding or "utf-8")
    assert ("日" in text) == (encoding in ("utf-8", None))
