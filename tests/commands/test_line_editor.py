"""line_editor.py, word_wrap.py: what a user types and sees in a terminal."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from llama.commands.chat import COMPLETIONS
from llama.commands.line_editor import _completer, _history, _keys
from llama.commands.word_wrap import WordWrap, columns_of


def test_alt_enter_begins_another_line() -> None:
    with create_pipe_input() as typed:
        session: PromptSession[str] = PromptSession(
            key_bindings=_keys(), input=typed, output=DummyOutput()
        )
        typed.send_text("one\x1b\rtwo\r")
        assert session.prompt() == "one\ntwo"


def test_completion(tmp_path: Path) -> None:
    (tmp_path / "dialog.json").touch()
    completer = _completer(COMPLETIONS)

    def completed(text: str) -> list[str]:
        found = completer.get_completions(Document(text), CompleteEvent())
        return [text[: len(text) + c.start_position] + c.text for c in found]

    assert completed("/s") == ["/system", "/set", "/show", "/save"]
    assert completed("/set top") == ["/set top_p", "/set top_k"]
    assert completed(f"/load {tmp_path}/di") == [f"/load {tmp_path}/dialog.json"]
    assert completed("") == completed("hello") == completed("/undo x") == []


def test_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(_history(tmp_path / "new" / "history"), FileHistory)
    assert isinstance(_history(tmp_path), InMemoryHistory)  # a folder
    monkeypatch.setenv("LLAMA3_HISTORY", "")
    assert isinstance(_history(tmp_path / "other"), InMemoryHistory)
    assert not (tmp_path / "other").exists()


def wrapped(pieces: list[str], width: int) -> str:
    wrap = WordWrap(width)
    return "".join(map(wrap.feed, pieces)) + wrap.end()


@given(st.lists(st.text("ab ", max_size=9), max_size=30), st.integers(1, 12))
@settings(deadline=None)
def test_lines_break_between_words(pieces: list[str], width: int) -> None:
    """The words of the text, in lines that fit where the words do, however it is cut in pieces."""
    text = "".join(pieces)
    found = wrapped(pieces, width)
    assert found.split() == text.split() and found == wrapped(list(text), width)
    if all(len(word) < width for word in text.split()):
        assert all(len(line.rstrip()) <= width for line in found.split("\n"))


def test_wrapping_is_that_of_textwrap() -> None:
    text = "The quick brown fox jumps over the lazy dog, again and again and again."
    assert wrapped([text], 20) == textwrap.fill(text, 20)
    assert wrapped(["one\n\n  two"], 20) == "one\n\n  two"
    assert columns_of("日本e\u0301") == 5
