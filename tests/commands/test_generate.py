"""generate.py: where `llama3 complete` takes its prompt from, and how it ends."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from llama.commands import generate
from llama.commands.parser import parse

PROMPT = "The capital of France is"
GREEDY = ["--temperature", "0", "-n", "12"]


@pytest.fixture(autouse=True)
def model(demo: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that is loaded already, for every call."""
    monkeypatch.setattr(generate, "open_model", lambda *_: demo)


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def completed(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    parse(["complete", *words, *GREEDY, "--json"])()
    found = capsys.readouterr()
    return json.loads(found.out), found.err


def test_the_prompt_from_a_word_a_file_and_stdin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt"
    file.write_text(PROMPT)
    stdin(monkeypatch, PROMPT.encode())
    expected, _ = completed([PROMPT], capsys)
    assert expected["prompt"] == PROMPT and "Paris" in expected["generation"]
    assert completed(["-"], capsys)[0] == expected
    assert completed(["--prompt_file", str(file)], capsys)[0] == expected


def test_prompts_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"caf\xe9")
    with pytest.raises(ValueError, match=r"standard input is not text in UTF-8: byte 4"):
        parse(["complete", "-"])()
    with pytest.raises(ValueError, match="takes either PROMPT"):
        parse(["complete", "Hi", "--prompt_file", "x"])()
    with pytest.raises(FileNotFoundError):
        parse(["complete", "--prompt_file", str(tmp_path / "absent")])()


def test_several_stop_texts(capsys: pytest.CaptureFixture[str]) -> None:
    whole, _ = completed([PROMPT], capsys)
    cut, _ = completed([PROMPT, "--stop", "absent", "--stop", "aris"], capsys)
    assert cut["finish_reason"] == "stop" and cut["generation"] == " P"
    assert whole["generation"].startswith(" Paris")


@pytest.mark.parametrize(("n", "flag"), [("3", "--max_gen_len"), ("400", "--max_seq_len")])
def test_an_answer_that_is_cut_says_so(
    n: str, flag: str, demo: Llama, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PROMPT if n == "3" else "one two " * 120
    parse(["complete", text, "--temperature", "0", "-n", n])()
    found = capsys.readouterr()
    generated = len(demo.tokenizer.encode(found.out.removesuffix("\n"), bos=False, eos=False))
    assert found.err.startswith("cut after ") and f"a larger {flag} gives more" in found.err
    assert abs(int(found.err.split()[2]) - generated) <= 1


def test_too_long_a_prompt_names_the_flag() -> None:
    with pytest.raises(ValueError, match="--max_seq_len 256; shorten it or use a larger"):
        parse(["complete", "word " * 600])()
