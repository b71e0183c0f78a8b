"""Files and folders that appear complete or not at all; JSON; checks of disk space and permission.

Knows nothing about what the files contain.
"""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llama.common.leftovers import locked_folder, remove_leftovers

MAX_JSON = 1 << 28  # bytes; a tokenizer.json has less than a tenth
MAX_REASON = 300  # characters of another library's message
MAX_MESSAGE = 2000  # characters of our own


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to `path` when the block ends without an error.

    The content is synced to the disk before the rename. After an error `path` is as it was, and
    the temporary file is removed.

    Raises:
        OSError: the file cannot be written.
    """
    # Not random: torch.save writes the name into the file, and a killed process leaves one file.
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        with open(temporary, "r+b") as f:
            os.fsync(f.fileno())  # a rename can reach the disk before the content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(dst: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `dst` that is renamed to `dst` when the block ends.

    If the block raises anything, an interrupt included, the temporary folder is removed and `dst`
    is as it was. What a killed process left beside `dst` is removed first.

    Args:
        replace: delete a `dst` that exists, once the new one is complete. The caller checks that
            it contains nothing that must be kept.

    Raises:
        FileExistsError: `dst` exists, before the block or after it, and not `replace`.
        OSError: the folder cannot be written.
    """
    in_the_way = f"{dst} exists already; remove it or choose another folder"
    if os.path.lexists(dst) and not replace:
        raise FileExistsError(in_the_way)
    leftover = f".{glob.escape(dst.name)}.{'[0-9a-f]' * 32}"
    remove_leftovers(dst.parent, f"{leftover}.tmp")
    if dst.exists():  # otherwise it is the only copy of a folder that was being replaced
        remove_leftovers(dst.parent, f"{leftover}.old")
    key = uuid.uuid4().hex
    temporary, old = (dst.with_name(f".{dst.name}.{key}.{kind}") for kind in ("tmp", "old"))
    try:
        with locked_folder(temporary):
            yield temporary
            if replace:
                with suppress(FileNotFoundError):  # none, or another process replaces it
                    os.rename(dst, old)
            try:
                os.rename(temporary, dst)
            except OSError as e:
                # Another process was faster.
                if dst.exists() or e.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise FileExistsError(in_the_way) from e
                raise
    except BaseException as e:
        shutil.rmtree(temporary, ignore_errors=True)
        if not dst.exists():
            with suppress(OSError):  # there is no old one, or another process was faster
                os.rename(old, dst)
        if dst.exists():
            shutil.rmtree(old, ignore_errors=True)
        if isinstance(e, OSError) and (message := _name_destination(e, temporary, dst)):
            raise OSError(message) from e
        raise
    shutil.rmtree(old, ignore_errors=True)


def _name_destination(e: OSError, temporary: Path, dst: Path) -> str | None:
    """The message of `e` with `dst` for `temporary`, which the user does not know.

    None: `e` is about another path.
    """
    if e.errno is None:  # raised by this library: the message names the path
        return str(e).replace(str(temporary), str(dst)) if str(temporary) in str(e) else None
    path = str(e.filename or temporary)
    if not path.startswith(str(temporary)) and not str(temporary).startswith(path):
        return None
    return f"{dst} cannot be written ({e.strerror}); choose another folder or disk"


def check_writable(folder: Path) -> None:
    """Create `folder` if it is missing.

    Raises:
        OSError: it cannot be created, or files cannot be created in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError("no permission to write")
    with tempfile.TemporaryFile(dir=folder):  # the superuser may write, and not on every system
        pass


def check_free_space(path: Path, needed: int) -> None:
    """Check that the disk of `path`, which need not exist yet, has `needed` bytes free.

    Raises:
        OSError: it has less.
    """
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OSError(
            f"writing {path} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB "
            "free; free some or choose another disk"
        )


def check_regular_file(path: Path) -> None:
    """Check that `path` is a file: a pipe would block its reader, a device might never end.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it is something else than a file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is a folder, a pipe or a device, not a file; get the file")


@contextmanager
def damage(path: Path, remedy: str = "download it again") -> Iterator[None]:
    """A block that reads `path`; what it raises becomes a ValueError that names the file.

    A ValueError that names it already passes, without the middle if it is very long; so do errors
    of the disk, of imports and of memory.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError):
        raise
    except Exception as e:
        if isinstance(e, ValueError) and str(path) in str(e):
            if len(str(e)) <= MAX_MESSAGE:
                raise
            half = MAX_MESSAGE // 2  # it quotes the file, and ends with the remedy
            raise ValueError(f"{str(e)[:half]} ... {str(e)[-half:]}") from None
        text = str(e) if isinstance(e, ValueError) and str(e) else f"{type(e).__name__}: {e}"
        reason = " ".join(text.split())[:MAX_REASON]
        raise ValueError(f"{path} is damaged ({reason}); {remedy}") from e


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`, which may start with a byte order mark.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, is not an object, is nested too deeply, or has a number
            that is not finite.
    """
    check_regular_file(path)
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path} has more than {MAX_JSON:,} bytes of JSON; download it again")
    try:
        value = parse_json(path.read_bytes())
    except ValueError as e:
        raise ValueError(f"{path} is not JSON ({e}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object; download it again")
    return value


def parse_json(data: bytes) -> Any:
    """The value of JSON text in UTF-8. Its numbers are finite and no larger than a float can be.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(
            data.decode("utf-8-sig"),
            parse_constant=_parse_constant,
            parse_int=lambda digits: int(digits) if _parse_float(digits) else 0,
            parse_float=_parse_float,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _parse_constant(name: str) -> None:
    raise ValueError(f"it has the number {name}")


def _parse_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:20]}... is too large")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON in UTF-8."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
