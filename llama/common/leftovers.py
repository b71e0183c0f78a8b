"""Temporary folders that are removed after a process was killed. Knows nothing about contents.

A process holds a lock on its temporary folder, which the system releases when the process ends in
whatever way. A folder without a lock is left over.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked and nothing removed
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("llama")


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Make `folder` if it is missing. In the block, `remove_leftovers` of others keeps it."""
    if fcntl is None:
        folder.mkdir(parents=True, exist_ok=True)
        yield
        return
    descriptor = _open_locked(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def _open_locked(folder: Path) -> int:
    """A descriptor with the lock. A folder that was removed before it was locked is made again."""
    while True:
        with suppress(FileExistsError):  # `exist_ok` raises it too, if it is removed meanwhile
            folder.mkdir(parents=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits for one that is removing it
        except OSError:  # a disk without locks, where nothing is removed
            return descriptor
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(folder), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)


def remove_leftovers(parent: Path, pattern: str) -> None:
    """Remove the folders in `parent` that match `pattern` and that no process uses, and say so."""
    if fcntl is None or not parent.is_dir():
        return
    for folder in parent.glob(pattern):
        if folder.is_symlink() or not folder.is_dir():
            continue
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except OSError:  # another's, or removed meanwhile
            continue
        try:
            if _is_unused(descriptor):
                shutil.rmtree(folder, ignore_errors=True)
                if not folder.exists():
                    log.info("removed %s, which a process that was killed has left", folder)
        finally:
            os.close(descriptor)


def _is_unused(descriptor: int) -> bool:
    """Take the lock, unless another process has it or the disk has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
