"""`verify`: all problems of a checkpoint on disk, each with its remedy.

Knows which files a layout needs and what Meta publishes about them. `file_checks` checks one file,
`weight_checks` the weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama.checkpoints.file_checks import (
    UNFINISHED_SUFFIXES,
    file_hash,
    find_corrupt_entry,
    find_damage,
    is_gguf,
)
from llama.checkpoints.formats.gguf_parts import part_paths
from llama.checkpoints.formats.hf import MAX_FILES, named_files
from llama.checkpoints.formats.hf_config import INDEX_FILE
from llama.checkpoints.locate import checkpoint_folder, expand, gguf_files
from llama.checkpoints.source import WEIGHT_SUFFIXES, Source
from llama.checkpoints.weight_checks import check_weights
from llama.common.files import read_json

# Meta's tokenizer.model of Llama 3 to 3.3: every model of 128,256 tokens has this one.
OFFICIAL_VOCABULARY = 128256
TOKENIZER_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
SHARD = re.compile(r"consolidated\.(\d+)\.pth")
# A line `md5  filename` of a checklist; a name, never a path.
CHECKSUM = re.compile(r"\s*([0-9a-fA-F]{32})\s+\*?(?:\./)?([^/\\\0]+?)\s*")
GET_AGAIN = "get or make it again"


class Problems:
    """The problems found so far.

    Attributes:
        lines: one per problem, in the order they were found.
        files: the files that have a problem.
        compared: the files that were compared with a published checksum.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.files: set[Path] = set()
        self.compared: set[Path] = set()

    def add(self, path: Path, what: str, remedy: str) -> None:
        """Add a problem of a file, unless it has one already: others mostly follow from it."""
        if path not in self.files:
            self.files.add(path)
            self.lines.append(" ".join(f"{path} {what}; {remedy}".split()))

    def run(self, check: Callable[[Path], str | None], path: Path) -> None:
        """Add what `check` finds wrong with `path`, or that the file cannot be read."""
        try:
            if what := check(path):
                self.add(path, f"is {what}", GET_AGAIN)
        except OSError as e:
            self.add(path, f"cannot be read ({e.strerror})", "check its permissions and the disk")


def verify(path: str | Path, open_source: Callable[[Path], Source]) -> list[str]:
    """Problems of the checkpoint at `path`, one line each with its remedy; [] if there are none.

    Checks names, headers, checksums and every number of the weights. A checkpoint with published
    checksums, or those of torch, is read twice. Progress goes to stderr.

    Args:
        path: a folder in Meta's or Hugging Face's layout, or with one GGUF file, or that file.
        open_source: opens any layout; called if the files of the weights are complete.

    Raises:
        ImportError: the extra that reads this layout is not installed.
    """
    path, problems = expand(path), Problems()
    if not path.exists():
        problems.add(path, "does not exist", "check the path, or download the checkpoint")
        return problems.lines
    try:
        folder = checkpoint_folder(path)
    except ValueError as e:
        return [str(e)]
    except OSError:
        folder = path
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        problems.add(folder, "cannot be read", "check its permissions")
        return problems.lines
    _check_files(folder, problems)
    expected = _expected_files(folder, problems) if folder.is_dir() else part_paths(folder)
    for file in expected:
        if not file.is_file():
            problems.add(file, "is missing", "download it")
    # Weights are not checked if a file is missing or damaged: their problems follow from that.
    needed = {file for file in expected if file.name != "tokenizer.model"}
    blocked = any(file in needed or file.suffix in WEIGHT_SUFFIXES for file in problems.files)
    if folder.is_dir():
        _check_tokenizer(folder, problems)
        _check_checksums(folder, problems)
    done = problems.files | problems.compared
    for file in [file for file in expected if file.suffix == ".pth" and file not in done]:
        problems.run(find_corrupt_entry, file)
        blocked = blocked or file in problems.files
    if not blocked:
        problems.lines += check_weights(path, open_source)
    return problems.lines


def _find_layout(folder: Path) -> str | None:
    """The layout of the files in a folder: "meta", "hf", "gguf", or None for other files."""
    if (folder / "params.json").is_file():
        return "meta"
    if (folder / "config.json").is_file() and (
        any(folder.glob("*.safetensors")) or not gguf_files(folder)
    ):
        return "hf"
    for layout, pattern in (
        ("meta", "consolidated.*.pth"),
        ("gguf", "*.[gG][gG][uU][fF]"),  # whatever the case
        ("hf", "*.safetensors"),
        ("hf", INDEX_FILE),
    ):
        if any(folder.glob(pattern)):
            return layout
    return None


def _check_files(path: Path, problems: Problems) -> None:
    """Check that each file of a checkpoint is what its name says, and complete."""
    parts = (*WEIGHT_SUFFIXES, ".json", ".model", ".chk")
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_symlink() and not file.exists():
            problems.add(file, "is a link to a file that does not exist", GET_AGAIN)
        elif not file.is_file():
            if file.suffix in parts and not file.is_dir():
                problems.add(file, "is a pipe or a device", "put the file in its place")
        elif file.suffix in UNFINISHED_SUFFIXES:
            problems.add(file, "is part of an unfinished download", "finish it, or remove the file")
        elif file.suffix.lower() in parts:
            problems.run(find_damage, file)
    if path.is_file() and path.suffix != ".gguf" and not is_gguf(path):
        problems.add(path, "is not a whole checkpoint", "give the folder that contains it")


def _expected_files(folder: Path, problems: Problems) -> list[Path]:
    """The files that a checkpoint in this folder's layout must have."""
    layout = _find_layout(folder)
    if layout == "meta":
        numbers = [int(m[1]) for f in folder.iterdir() if (m := SHARD.fullmatch(f.name))]
        numbers = [number for number in numbers if number < MAX_FILES]
        shards = [f"consolidated.{i:02}.pth" for i in range(max(numbers, default=0) + 1)]
        return [folder / name for name in ("params.json", *shards, "tokenizer.model")]
    if layout == "hf":
        files = [folder / "config.json", *_safetensors_files(folder, problems)]
        tokenizers = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
        if not any((folder / name).is_file() for name in tokenizers):
            problems.add(folder / "tokenizer.json", "is missing", "download it")
        return files
    if layout == "gguf":
        files = gguf_files(folder)
        if len(files) > 1:
            problems.add(
                folder, f"contains {len(files)} GGUF files", "give the path of one of them"
            )
            return [*files, folder]
        return [part for file in files for part in part_paths(file)]
    problems.add(
        folder, "contains no checkpoint", "give the folder with params.json or config.json"
    )
    return [folder]


def _safetensors_files(folder: Path, problems: Problems) -> list[Path]:
    """The files that the folder must have; if they cannot be known, its index, with a problem."""
    index = folder / INDEX_FILE
    try:
        return named_files(folder)
    except (OSError, ValueError) as e:
        if index not in problems.files:
            problems.files.add(index)
            problems.lines.append(str(e))
        return [index]


def _read_json_or_empty(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; {} if it is not one, which `_check_files` reports."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def _check_tokenizer(folder: Path, problems: Problems) -> None:
    """Check that the tokenizer.model of a model with Llama 3's vocabulary size is Meta's."""
    path, params = folder / "tokenizer.model", _read_json_or_empty(folder / "params.json")
    sidecar = folder / "tokenizer.model.json"  # defines another tokenizer
    if params.get("vocab_size") != OFFICIAL_VOCABULARY or sidecar.exists() or not path.is_file():
        return

    def not_official(path: Path) -> str | None:
        same = (found := file_hash(path, "sha256")) == TOKENIZER_SHA256
        return None if same else f"not Llama 3's: SHA-256 {found}, not {TOKENIZER_SHA256}"

    if path not in problems.files:
        problems.run(not_official, path)


def _check_checksums(folder: Path, problems: Problems) -> None:
    """Compare with checklist.chk and .md5 files: lines `md5  filename` or `filename md5`."""
    for checklist in [*folder.glob("checklist.chk"), *folder.glob("*.md5")]:
        if checklist in problems.files or not checklist.is_file():
            continue
        try:
            lines = checklist.read_text("utf-8", errors="replace").splitlines()
        except OSError as e:
            problems.add(checklist, f"cannot be read ({e.strerror})", "check its permissions")
            continue
        for number, line in enumerate(lines, 1):
            reversed_line = " ".join(reversed(line.split()))
            match = CHECKSUM.fullmatch(line) or CHECKSUM.fullmatch(reversed_line)
            if match is not None:
                _check_checksum(folder / match[2], match[1].lower(), checklist.name, problems)
            elif line.strip():
                problems.add(checklist, f"has no 'MD5 filename' on line {number}", GET_AGAIN)


def _check_checksum(file: Path, published: str, checklist: str, problems: Problems) -> None:
    def not_published(file: Path) -> str | None:
        same = (found := file_hash(file, "md5")) == published
        return None if same else f"not as published: MD5 {found}, not {published}"

    if not file.is_file():
        problems.add(file, f"is missing, but listed in {checklist}", "download it")
    elif file not in problems.files:
        problems.run(not_published, file)
        problems.compared.add(file)
