"""`llama3 explain`: the text, the page, and mistakes before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama import Llama
from llama.commands import explain
from llama.commands.parser import parse


@pytest.fixture(scope="module")
def tiny(folder: Path, byte_tokenizer_path: Path) -> Iterator[Llama]:
    with Llama.build(folder, byte_tokenizer_path, 64, 1, device="cpu", dtype="fp32") as llama:
        yield llama


@pytest.fixture
def flags(folder: Path, byte_tokenizer_path: Path) -> list[str]:
    paths = ["-m", str(folder), "--tokenizer_path", str(byte_tokenizer_path)]
    return [*paths, "--device", "cpu", "--dtype", "fp32"]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(explain, "open_model", fail)


def call(*words: str) -> None:
    parse(["explain", *words])()


def test_the_text(
    flags: list[str], folder: Path, tiny: Llama, capsys: pytest.CaptureFixture[str]
) -> None:
    call("Hi \x1b[31m", *flags, "--temperature", "0.5", "--top_k", "3")
    out, err = capsys.readouterr()
    trace = tiny.explain("Hi \x1b[31m", temperature=0.5, top_k=3, name=folder.name)
    assert out.startswith(f"model: {folder.name}\n")
    assert out == str(trace) + "\n" and "\x1b" not in out and r'"\x1b"' in out
    assert "temperature 0.5, top_k 3, top_p 0.9: " in out
    total = sum(stage.parameters for stage in trace.stages)
    assert f"{total:,}" in out and "--out report.html" in err


def test_the_page(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "report.html"
    call("Hello", *flags, "--out", str(out))
    assert out.read_text("utf-8").startswith("<!doctype html>")
    assert f"page written to {out}" in capsys.readouterr().err
    with pytest.raises(FileExistsError, match="or give --force to replace it"):
        call("Hello", *flags, "--out", str(out))
    out.write_text("old")
    call("Hello", *flags, "--out", str(out), "--force")
    assert "old" not in out.read_text("utf-8")[:10]
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_a_long_prompt(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    call("x" * 300, *flags, "--max_tokens", "20")
    assert (
        "The first 20 of the prompt's 301 tokens; raise --max_tokens to" in capsys.readouterr().out
    )


def test_as_a_message(
    flags: list[str], folder: Path, tiny: Llama, capsys: pytest.CaptureFixture[str]
) -> None:
    call("Hi", "--chat", *flags)
    message: Any = {"role": "user", "content": "Hi"}
    assert capsys.readouterr().out == str(tiny.explain([message], name=folder.name)) + "\n"


def test_a_base_without_chat_format(
    tiny: Llama, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explain, "open_model", lambda *_: tiny)
    monkeypatch.setattr(tiny, "formatter", None)
    monkeypatch.setattr(tiny, "close", lambda: None)
    with pytest.raises(ValueError, match="--chat needs a chat format, and this checkpoint has"):
        call("Hi", "--chat", *flags)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_tokens", "0"], "--max_tokens must be 1 to 4096, not 0"),
        (["--max_tokens", "9999"], "--max_tokens must be 1 to 4096, not 9999"),
        (["--temperature", "-1"], "temperature must be 0 or more"),
        (["--out", "{file}"], "exists already"),
        (["--out", "{file}/page.html"], r"cannot be written .*; choose another folder"),
        (["--out", "-"], "--out writes a file, not standard output; give a name"),
        (["--out", "{folder}", "--force"], "is a folder; give the name of a file"),
    ],
)
def test_mistakes_before_a_model_is_loaded(
    no_model: None, tmp_path: Path, words: list[str], message: str
) -> None:
    file = tmp_path / "report.html"
    file.write_text("old")
    words = [word.format(file=file, folder=tmp_path) for word in words]
    with pytest.raises((ValueError, OSError), match=message):
        call("Hi", *words)
    assert file.read_text() == "old"


def test_several_ranks(no_model: None, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"}
    for name, value in (names | {"MASTER_ADDR": "localhost"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="explain runs on one rank"):
        call("Hi")


def test_a_prompt_is_needed() -> None:
    with pytest.raises(ValueError, match="PROMPT"):
        parse(["explain"])
