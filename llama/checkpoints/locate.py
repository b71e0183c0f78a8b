"""A user's path -> the folder or GGUF file of a checkpoint. Opens no file of it."""

from __future__ import annotations

import os
from pathlib import Path

from llama.checkpoints.formats.gguf_parts import part_paths
from llama.checkpoints.source import WEIGHT_SUFFIXES
from llama.common.listing import listing


def expand(path: str | Path) -> Path:
    """`path`, with the home folder for a leading `~` unless there is such a file."""
    path = Path(path)
    return path if path.exists() else Path(os.path.expanduser(path))


def checkpoint_folder(path: Path) -> Path:
    """The folder that holds a checkpoint's files: `path`, or one in it; a file is returned as is.

    It is `snapshots/...` of a repository in Hugging Face's cache, and `original` of a repository
    whose other files are no weights.

    Raises:
        ValueError: several folders come into question; the message names them.
    """
    if not path.is_dir() or (path / "params.json").is_file():
        return path
    if (path / "snapshots").is_dir():
        return checkpoint_folder(_snapshot(path))
    weights = [f for f in path.iterdir() if f.suffix.lower() in WEIGHT_SUFFIXES]
    if not weights and (path / "original" / "params.json").is_file():
        return path / "original"
    if not weights and not (path / "config.json").is_file():
        inside = sorted(f.name for f in path.iterdir() if _is_checkpoint(f))
        if inside:
            raise ValueError(
                f"{path} is no checkpoint, but contains some; give the path of one: "
                f"{listing(inside, 4)}"
            )
    return path


def _snapshot(repository: Path) -> Path:
    """The folder of the version `main`, or of the only one, in a folder of Hugging Face's cache."""
    folders = sorted(f for f in (repository / "snapshots").iterdir() if f.is_dir())
    main = repository / "refs" / "main"
    if main.is_file():
        version = main.read_text("utf-8", errors="replace").strip()
        folders = [f for f in folders if f.name == version] or folders
    if len(folders) == 1:
        return folders[0]
    names = listing([f.name for f in folders], 4)
    raise ValueError(
        f"{repository} has {len(folders)} versions in its snapshots"
        + (f"; give the path of one: {names}" if folders else "; download the model again")
    )


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a checkpoint, or like one in Hugging Face's cache."""
    names = ("params.json", "config.json", "snapshots", "original/params.json")
    try:
        return any((folder / name).exists() for name in names) or bool(gguf_files(folder))
    except OSError:  # no permission to read it
        return False


def gguf_files(folder: Path) -> list[Path]:
    """The GGUF files in a folder, of a split one its first part that is there.

    Vision projectors, which this library does not read, are left out.
    """
    if not folder.is_dir():
        return []
    files: dict[Path, Path] = {}
    for file in sorted(folder.iterdir()):
        projector = file.name.lower().startswith("mmproj")
        if file.suffix.lower() == ".gguf" and file.is_file() and not projector:
            files.setdefault(part_paths(file)[0], file)
    return list(files.values())


def only_gguf(folder: Path) -> Path | None:
    """The GGUF file in a folder, of a split one its first part; None: there is none.

    Raises:
        ValueError: there are several models.
    """
    files = gguf_files(folder)
    if len(files) > 1:
        names = listing([f.name for f in files], 4)
        raise ValueError(
            f"{folder} contains {len(files)} GGUF files; give the path of one of them: {names}"
        )
    return files[0] if files else None
