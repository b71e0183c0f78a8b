"""Files and folders that appear complete or not at all; JSON; checks of disk space and permission.

Knows nothing about what the files contain.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llama.common.leftovers import locked_folder, remove_leftovers


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
        temporary.mkdir(parents=True)
        with locked_folder(temporary):
            yield temporary
        if replace and dst.exists():
            os.rename(dst, old)
        try:
            os.rename(temporary, dst)
        except OSError as e:
            if dst.exists():  # another process was faster
                raise FileExistsError(in_the_way) from e
            raise
    except BaseException as e:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not dst.exists():
            os.rename(old, dst)
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


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        ValueError: the file is not JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not JSON ({e}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object; download it again")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON in UTF-8."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
