"""The cache of compiled kernels: what may be loaded from it, and that it is compiled once."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from llama.layers import kernels
from llama.layers.kernels.library import digest_path, library_path, open_library

# Logs each call, and "compiles" to a copy of its own source.
COMPILER = """#!/bin/sh
echo "$@" >> {log}
while [ "$1" != -o ]; do shift; done
sleep {seconds}
cp "$0" "$2"
"""


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for compiled kernels that does not exist yet, and a compiler of a moment."""
    set_compiler(monkeypatch, tmp_path)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "_loaded", None)
    return tmp_path / "cache"


def set_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path, seconds: float = 0) -> None:
    script = folder / "compiler"
    script.write_text(COMPILER.format(log=folder / "log", seconds=seconds))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


def compiled(cache: Path) -> int:
    """How many times the library was linked."""
    log = cache.parent / "log"
    return log.read_text().count("-shared") if log.exists() else 0


def content() -> bytes:
    with open_library() as file:
        return file.read()


def plant(folder: Path) -> Path:
    """Put a library under the public name that writes a file when it is loaded; return the file."""
    folder.mkdir(exist_ok=True)
    proof, source = folder.parent / "it_ran", folder.parent / "planted.cpp"
    source.write_text(
        "#include <cstdio>\n"
        f'__attribute__((constructor)) void run() {{ fclose(fopen("{proof}", "w")); }}\n'
    )
    command = ["g++", "-shared", "-fPIC", str(source), "-o", str(library_path())]
    subprocess.run(command, check=True)
    return proof


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o703])
def test_a_folder_that_others_can_write_is_refused(
    cache: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    proof = plant(cache)
    cache.chmod(mode)
    assert not kernels.load()
    assert f"other users can write to {cache}" in caplog.text
    assert "chmod go-w it, or set TORCH_EXTENSIONS_DIR to a folder of your own" in caplog.text
    assert not proof.exists() and not compiled(cache)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_refused(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    proof = plant(cache)
    os.chown(cache, 12345, -1)
    assert not kernels.load()
    assert f"{cache} belongs to another user (id 12345); set TORCH_EXT" in caplog.text
    assert not proof.exists() and not compiled(cache)


@pytest.mark.parametrize(
    "damage",
    ["planted", "empty", "truncated", "bit", "digest", "writable", "link", "fifo", "other"],
)
def test_a_file_without_its_digest_or_of_others_is_compiled_again(cache: Path, damage: str) -> None:
    good, path = content(), library_path()
    if damage == "planted":
        plant(cache)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        os.truncate(path, len(good) - 1)
    elif damage == "bit":
        path.write_bytes(good[:9] + bytes([good[9] ^ 1]) + good[10:])
    elif damage == "digest":
        digest_path(path).unlink()
    elif damage == "writable":
        path.chmod(0o666)
    elif damage in ("link", "fifo"):
        path.rename(cache / "elsewhere")
        path.symlink_to(cache / "elsewhere") if damage == "link" else os.mkfifo(path)
    elif damage == "other":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file to another user")
        os.chown(path, 12345, -1)
    assert content() == good == path.read_bytes() and compiled(cache) == 2
    assert content() == good and compiled(cache) == 2


def test_the_umask_gives_nobody_more(cache: Path) -> None:
    umask = os.umask(0)
    try:
        content()
    finally:
        os.umask(umask)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o022 == 0 for path in cache.iterdir())


def test_cold_processes_compile_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock of an open file excludes threads as it does processes."""
    set_compiler(monkeypatch, cache.parent, seconds=0.3)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(content())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1 and compiled(cache) == 1


def test_what_killed_processes_left_is_removed(cache: Path) -> None:
    (cache / "llama3_kernels_k1lled").mkdir(parents=True)
    (cache / "llama3_kernels_k1lled" / "linear.o").touch()
    (cache / "of_another_extension").mkdir()
    cache.chmod(0o700)
    content()
    name = library_path().name
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        ["llama3_kernels_lock", name, f"{name}.sha256", "of_another_extension"]
    )


def test_the_name_depends_on_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for command in ("", "g++", "g++ -g", "clang++"):
        monkeypatch.setenv("CXX", command)
        names.append(library_path())
    assert names[0] == names[1] and len(set(names)) == 3
