"""`Trace`: what a model computed for one prompt, and how it is shown."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llama.common.files import check_writable, replacing_file
from llama.explain.page import embedded_page, page_of
from llama.explain.record import Record
from llama.explain.text import terminal_text

LONGEST_NAME = 200  # bytes; while a page is written, its name is longer


class Trace(Record):
    """A `Record` that shows itself: `str` for a terminal, a page for a browser and for Jupyter."""

    def __str__(self) -> str:
        return terminal_text(self)

    def __repr__(self) -> str:
        args = self.args
        return f"Trace({len(self.ids)} tokens, {args.n_layers} layers, {args.n_heads} heads)"

    def _repr_html_(self) -> str:
        return embedded_page(self)

    def to_html(self) -> str:
        """The page: one file under 2 MB that needs no other, for any browser."""
        return page_of(self)

    def save(self, path: str | Path, force: bool = False, how: str = "force=True") -> Path:
        """Write the page; it appears when it is complete. Returns its path.

        Args:
            force: replace a file that exists.
            how: see `check_output`.

        Raises:
            FileExistsError: `path` exists, and not `force`.
            OSError: it cannot be written.
        """
        path = check_output(path, force, how)
        with naming(path), replacing_file(path) as temporary:
            temporary.write_text(self.to_html(), encoding="utf-8")
        return path


def check_output(path: str | Path, force: bool = False, how: str = "force=True") -> Path:
    """The path of a page to write, in a folder where a file could be written just now.

    Folders that are missing are created.

    Args:
        force: a file that exists will be replaced.
        how: what the user gives for that.

    Raises:
        FileExistsError: it exists, and not `force`; or it is a folder, a device or a pipe.
        ValueError: no file can have this name.
        OSError: nothing can be written there.
    """
    path = Path(path).expanduser()
    if "\0" in str(path) or len(os.fsencode(path.name)) > LONGEST_NAME:
        raise ValueError(f"no file can have the name {path.name[:40]!r}...; choose a shorter one")
    for folder in path.parents:
        if os.path.lexists(folder) and not os.path.isdir(folder):
            raise FileExistsError(
                f"{path} cannot be written ({folder} is no folder); choose another folder"
            )
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder; give the name of a file in it")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is no regular file; choose another name")
    if os.path.lexists(path) and not force:
        raise FileExistsError(
            f"{path} exists already; choose another name, or give {how} to replace it"
        )
    with naming(path):
        check_writable(path.parent)
    return path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A block that writes `path`; its OSErrors name this path, and not a temporary one."""
    try:
        yield
    except OSError as e:
        reason = e.strerror or str(e)
        raise OSError(f"{path} cannot be written ({reason}); choose another folder") from None
