"""`llama3 quantize --calibrate`: output, and mistakes in one line."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llama import Llama
from llama.commands.parser import parse


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path], byte_tokenizer_path: Path) -> Path:
    folder = tiny_checkpoint(vocab_size=512, multiple_of=64)
    shutil.copyfile(byte_tokenizer_path, folder / "tokenizer.model")
    return folder


def call(line: str) -> None:
    parse(shlex.split(line))()


def test_calibrated_checkpoint(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("A text like those that the model will read. " * 20)
    flags = "--scheme int4 --windows 4 --max_seq_len 32"
    call(f"quantize {checkpoint} {out} --calibrate {text} {flags}")
    assert capsys.readouterr().out == f"{out}\n"
    call(f"verify {out}")
    assert "every check passed" in capsys.readouterr().out
    llama = Llama.build(out, None, 64, 1, device="cpu")
    [answer] = llama.text_completion(["A text"], max_gen_len=4, temperature=0)
    assert isinstance(answer["generation"], str)


MISTAKES = {
    "--scheme int4 --windows 4": "--windows needs --calibrate",
    "--scheme int4 --max_seq_len 4": "--max_seq_len needs --calibrate",
    "--scheme int4 --calibrate short.txt": r"a window needs 511; .* a smaller --max_seq_len",
    "--scheme int4 --calibrate short.txt --windows 0": "--windows must be 1 or more, not 0",
    "--scheme int4 --calibrate empty.txt": r"empty\.txt is empty",
    "--scheme int4 --calibrate latin.txt": r"latin\.txt is not text in UTF-8: .* at byte 1",
    "--scheme int4 --calibrate missing.txt": r"missing\.txt",
    "--scheme int8 --calibrate short.txt": "a calibration is for int4; int8 loses",
}


@pytest.mark.parametrize(("flags", "message"), MISTAKES.items())
def test_mistakes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, message: str
) -> None:
    (tmp_path / "short.txt").write_text("Too short")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(f"quantize {checkpoint} out {flags}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.txt", "latin.txt", "short.txt"]
