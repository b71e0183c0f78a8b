"""files.py: files and folders that appear complete or not at all; checks before writing; JSON."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from llama.common.files import (
    check_free_space,
    check_writable,
    damage,
    new_folder,
    read_json,
    replacing_file,
    write_json,
)


def test_new_folder_appears_complete(tmp_path: Path) -> None:
    dst = tmp_path / "new" / "model"
    with new_folder(dst) as folder:
        assert not dst.exists()
        (folder / "file").write_text("")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        "new",
        "new/model",
        "new/model/file",
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_new_folder_leaves_nothing_after_an_error(error: Any, tmp_path: Path) -> None:
    with pytest.raises((KeyboardInterrupt, OSError)), new_folder(tmp_path / "model") as folder:
        (folder / "file").write_text("")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda tmp: OSError(27, "File too large"), "{dst} cannot be written (File too large); "),
        (lambda tmp: OSError(28, "No space", f"{tmp}/a"), "{dst} cannot be written (No space); "),
        (lambda tmp: OSError(f"{tmp}/a is too much"), "{dst}/a is too much"),
        (lambda tmp: OSError(5, "Input/output error", "/src"), "[Errno 5] Input/output error: "),
    ],
)
def test_errors_name_the_destination(error: Any, message: str, tmp_path: Path) -> None:
    """Not the temporary folder, which the user does not know."""
    dst = tmp_path / "model"
    with pytest.raises(OSError) as caught, new_folder(dst) as folder:
        raise error(folder)
    assert str(caught.value).startswith(message.format(dst=dst)) and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    dst = tmp_path / "file" / "model"
    with pytest.raises(OSError, match=f"^{dst} cannot be written .Not a dir"), new_folder(dst):
        pass


def test_new_folder_does_not_replace(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    with pytest.raises(FileExistsError, match="remove it or choose another"), new_folder(tmp_path):
        raise AssertionError("not reached")
    assert [p.name for p in tmp_path.iterdir()] == ["keep"]


def test_another_process_is_faster(tmp_path: Path) -> None:
    dst = tmp_path / "model"
    with pytest.raises(FileExistsError), new_folder(dst) as folder:
        (folder / "file").write_text("")
        dst.mkdir()
        (dst / "theirs").write_text("")
    assert [p.name for p in sorted(tmp_path.rglob("*"))] == ["model", "theirs"]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_replaced_folder(error: Any, tmp_path: Path) -> None:
    """It stays if the block fails."""
    dst = tmp_path / "model"
    dst.mkdir()
    (dst / "old").touch()
    try:
        with new_folder(dst, replace=True) as folder:
            (folder / "new").touch()
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    names = [p.name for p in sorted(tmp_path.rglob("*"))]
    assert names == ["model", "old" if error else "new"]


def test_replacing_file_syncs_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, synced = os.fsync, []

    def record(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((os.fstat(descriptor).st_ino, path.read_text()))

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", record)
    with replacing_file(path) as temporary:
        temporary.write_text("new")
    assert synced == [(path.stat().st_ino, "old")]
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_replacing_file_after_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing_file(path) as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_check_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        check_writable(tmp_path / "file" / "folder")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="no permission to write"):
        check_writable(tmp_path)


def test_check_free_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    path = tmp_path / "not" / "there"
    check_free_space(path, 2 * 10**9)
    with pytest.raises(OSError, match=f"writing {path} needs 2.1 GB and its disk has 2.0 GB free;"):
        check_free_space(path, 21 * 10**8)
    assert not list(tmp_path.iterdir())


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": "ä"})
    assert path.read_bytes() == '{\n  "a": "ä"\n}\n'.encode()
    assert read_json(path) == {"a": "ä"}
    for text, message in (("[1]", "not a JSON object"), ("{", "not JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path} is {message}.*; download it again"):
            read_json(path)


def test_json_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + b'{"max": 1000000000000000019884624838656}')
    assert read_json(tmp_path / "a.json") == {"max": int(1e30)}  # as tokenizer_config.json has it


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": 1' + "0" * 400 + "}",
        '{"a": 1' + "0" * 10_000 + "}",
        b"\xff\xfe{\x00}\x00",
        "",
    ],
    ids=["deep lists", "deep objects", "nan", "inf", "float", "int", "digits", "utf-16", "empty"],
)
def test_json_that_python_cannot_use(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"{path} is not JSON .*; download it again"):
        read_json(path)


def test_files_that_are_no_files(tmp_path: Path) -> None:
    """Opening a pipe would block."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(ValueError, match=f"{path} is a folder, a pipe or a device"):
            read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "absent")


def test_damage(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for error in (KeyError("x"), RecursionError(), ZeroDivisionError(), ValueError("y" * 1000)):
        message = f"^{path} is damaged .*; download it again"
        with pytest.raises(ValueError, match=message) as found, damage(path):
            raise error
        assert len(str(found.value)) < 500
    for passed in (ValueError(f"{path} is old"), OSError(5, "disk"), MemoryError(), ImportError()):
        with pytest.raises(type(passed)) as same, damage(path):
            raise passed
        assert same.value is passed
    message = rf"^{path}: x+ \.\.\. x+; remove it$"
    with pytest.raises(ValueError, match=message) as found, damage(path):
        raise ValueError(f"{path}: {'x' * 10**6}; remove it")
    assert len(str(found.value)) < 2100
