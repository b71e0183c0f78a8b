"""text/scripts.py. Oracle: the names of characters in Python's unicodedata."""

from __future__ import annotations

import unicodedata

import pytest

from llama.text.scripts import Scripts


def test_characters_inside_of_characters() -> None:
    """A token may end inside of a character if all that can follow is of the script."""
    han = Scripts(["Han"])
    for first in range(0xE0, 0xF0):
        for second in range(0x80, 0xC0):
            start, names = bytes([first, second]), []
            for third in range(0x80, 0xC0):
                character = (start + bytes([third])).decode("utf-8", "ignore")
                if character and unicodedata.category(character) not in ("Cn", "Co"):
                    names.append(unicodedata.name(character))
            ideographs = [n.startswith(("CJK UNIFIED", "CJK COMPATIBILITY IDEO")) for n in names]
            if names and (all(ideographs) or not any(ideographs)):
                symbols = any(n.startswith(("CJK", "KANGXI", "IDEOGRAPHIC")) for n in names)
                if not symbols or all(ideographs):
                    assert han.contain(start) == all(ideographs), (start, names[:2])
    assert not han.contain(b"\xe4")  # also the start of the hexagrams
    assert han.contain(b"\xe6")


@pytest.mark.parametrize(
    ("names", "inside", "outside"),
    [
        (["Han"], "文 。々𠀀", "aд1 ,あ한ー\n"),
        (["Hiragana", "Katakana"], "あア。ー", "文a1"),
        (["hangul"], "한", "文a1あ"),
        (None, "文あ한дωअا。ー\u064b", "aé1, ,\n\u0301÷😀"),
        (["all"], "文a1,😀\n", ""),
    ],
)
def test_characters(names: list[str] | None, inside: str, outside: str) -> None:
    scripts = Scripts(names)
    assert [c for c in inside if not scripts.contain(c.encode())] == []
    assert [c for c in outside if scripts.contain(c.encode()) and c != " "] == []


def test_bytes() -> None:
    han = Scripts(["Han"])
    assert han.contain(" 文件".encode())
    assert han.contain(" 文".encode() + b"\xe4\xbb")
    assert not han.contain("  文".encode())
    assert not han.contain("文 件".encode())
    assert not han.contain("文".encode()[1:])
    assert not han.contain("文".encode() + b"\xef\xbc")  # a comma may follow
    assert Scripts(["all"]).contain(b"\x96\x87\xe4")


@pytest.mark.parametrize("name", ["Chinese", "", "Han}", "{", "\\p"])
def test_unknown_script(name: str) -> None:
    with pytest.raises(ValueError, match="Unicode has no script"):
        Scripts([name])
