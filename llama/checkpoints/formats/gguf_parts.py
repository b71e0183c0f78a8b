"""The parts of a split GGUF: NAME-00001-of-00003.gguf, ... as llama.cpp's gguf-split writes them.

The first part has the metadata; each has tensors of its own and its place in the split.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama.checkpoints.formats.gguf_header import GGUFHeader
from llama.common.listing import listing

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
MOST_PARTS = 1000


def part_paths(path: Path) -> list[Path]:
    """All parts of the split GGUF that `path` is one of, in order; [path] if it is not split."""
    name = PART.fullmatch(path.name)
    if name is None or not 1 <= int(name[2]) <= int(name[3]) <= MOST_PARTS:
        return [path]
    names = [f"{name[1]}-{i:05}-of-{name[3]}{name[4]}" for i in range(1, int(name[3]) + 1)]
    return [path.parent / name for name in names]


def find_parts(path: Path) -> list[Path]:
    """As `part_paths`, for parts that exist.

    Raises:
        FileNotFoundError: there is no file at `path`, or a part is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no GGUF file at {path}; give the path of a .gguf file")
    paths = part_paths(path)
    if missing := [part.name for part in paths if not part.is_file()]:
        raise FileNotFoundError(
            f"{path.parent} lacks parts of a split GGUF: {listing(missing, 3)}; download them"
        )
    return paths


def check_parts(paths: Sequence[Path], parts: Sequence[GGUFHeader]) -> None:
    """Check that opened files are all parts of one split, in order, or one that is not split.

    Raises:
        ValueError: a file belongs elsewhere, or parts are of different models.
    """
    for i, (path, header) in enumerate(zip(paths, parts, strict=True)):
        place = _value(header, "split.no", 0), _value(header, "split.count", 1)
        if place != (i, len(parts)):
            raise ValueError(
                f"{path} is part {place[0]} of {place[1]}, counted from 0, and its name says part "
                f"{i} of {len(parts)}; give the parts their names NAME-00001-of-00003.gguf, or "
                "merge them (gguf-split --merge)"
            )
    names = [tensor.name for header in parts for tensor in header.tensors]
    expected = _value(parts[0], "split.tensors.count", len(names))
    if len(names) != expected or len(set(names)) != len(names):
        raise ValueError(
            f"{paths[0]}: the parts have {len(set(names))} tensors instead of {expected}: they are "
            "not of one model; download all of them again"
        )


def _value(header: GGUFHeader, key: str, default: int) -> Any:
    return header.fields[key].contents() if key in header.fields else default
