"""Is a checkpoint whole and right? Every problem is found and named, with its remedy.

Knows which files a layout needs and what Meta publishes of them; knows no model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoints.file_damage import (
    UNFINISHED,
    damage,
    damaged_entry,
    digest,
    is_gguf,
    recognise,
)
from llama.checkpoints.source import Source
from llama.common.progress import progress
from llama.distributed.sharding import shard_dim

__all__ = ["recognise", "verify"]

# Meta's tokenizer.model of Llama 3 to 3.3, which every model of 128,256 tokens comes with.
OFFICIAL_VOCABULARY = 128256
TOKENIZER_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
SHARD = re.compile(r"consolidated\.(\d+)\.pth")
SUM = re.compile(r"\s*([0-9a-fA-F]{32})\s+\*?(?:\./)?([^/\\\0]+?)\s*")  # a name, never a path
INDEX = "model.safetensors.index.json"
WEIGHTS = (".pth", ".safetensors", ".gguf")
AGAIN = "get or make it again"
NUMBERS_AT_ONCE = 1 << 22  # weights are looked through in pieces of so many: 16 MB in fp32


class Report:
    """Problems in the order they were found, one line each; which files have one, and of which a
    sum was published."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.files: set[Path] = set()
        self.summed: set[Path] = set()

    def add(self, path: Path, what: str, remedy: str) -> None:
        """`path` has a problem; only the first one of a file is told: the rest follows from it."""
        if path not in self.files:
            self.files.add(path)
            self.tell(f"{path} {what}; {remedy}")

    def look(self, path: Path, check: Callable[[Path], str | None]) -> None:
        """Add what `check` says that `path` is, or that it cannot be read."""
        try:
            if what := check(path):
                self.add(path, f"is {what}", AGAIN)
        except OSError as e:
            self.add(path, f"cannot be read ({e.strerror})", "check its permissions and the disk")

    def tell(self, text: object) -> None:
        self.lines.append(" ".join(str(text).split()))


def verify(path: str | Path, open_source: Callable[[Path], Source]) -> list[str]:
    """Every problem of the checkpoint at `path`, a line each that says the remedy; [] if none.

    Names, headers, checksums and every number of the weights are looked at; a checkpoint with
    published checksums, or torch's own, is read twice. A bad one does not raise. Progress goes to
    stderr.

    Args:
        path: a folder in Meta's or Hugging Face's layout, or with one GGUF file, or that file.
        open_source: opens any layout; called if the weights' files are all there and whole.

    Raises:
        ImportError: the extra that reads this layout is not installed.
    """
    path, report = Path(path), Report()
    if not path.exists():
        report.add(path, "is not there", "check the path, or download the checkpoint")
        return report.lines
    folder = _checkpoint_folder(path)
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        report.add(folder, "cannot be read", "check its permissions")
        return report.lines
    _check_files(folder, report)
    expected = _expected_files(folder, report) if folder.is_dir() else [folder]
    for file in expected:
        if not file.is_file():
            report.add(file, "is missing", "download it")
    # What follows from a file that is not there or not whole would only hide it.
    needed = {file for file in expected if file.name != "tokenizer.model"}
    blocked = any(file in needed or file.suffix in WEIGHTS for file in report.files)
    if folder.is_dir():
        _check_tokenizer(folder, report)
        _check_sums(folder, report)
    known = report.files | report.summed
    for file in [file for file in expected if file.suffix == ".pth" and file not in known]:
        report.look(file, damaged_entry)
        blocked = blocked or file in report.files
    if not blocked:
        _check_weights(path, open_source, report)
    return report.lines


def _checkpoint_folder(path: Path) -> Path:
    """`path`, or its `original/` where that is what would be opened (see `llama.formats`)."""
    original = path / "original"
    if path.is_dir() and not _layout(path) and _layout(original) == "meta":
        return original
    return path


def _layout(folder: Path) -> str | None:
    if (folder / "params.json").is_file():
        return "meta"
    if (folder / "config.json").is_file():
        return "hf"
    for layout, pattern in (
        ("meta", "consolidated.*.pth"),
        ("gguf", "*.gguf"),
        ("hf", "*.safetensors"),
        ("hf", INDEX),
    ):
        if any(folder.glob(pattern)):
            return layout
    return None


def _check_files(path: Path, report: Report) -> None:
    """Every file that can be part of a checkpoint is what its name says, and whole."""
    parts = (*WEIGHTS, ".json", ".model", ".chk")
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_symlink() and not file.exists():
            report.add(file, "is a link to nothing", AGAIN)
        elif not file.is_file():
            continue
        elif file.suffix in UNFINISHED:
            report.add(file, "is left of an unfinished download", "finish it, or remove the file")
        elif file.suffix in parts:
            report.look(file, damage)
    if path.is_file() and path.suffix != ".gguf" and not is_gguf(path):
        report.add(path, "is not a checkpoint by itself", "give the folder that it lies in")


def _expected_files(folder: Path, report: Report) -> list[Path]:
    """The files that a checkpoint of this folder's layout cannot be without."""
    layout = _layout(folder)
    if layout == "meta":
        numbers = [int(m[1]) for f in folder.iterdir() if (m := SHARD.fullmatch(f.name))]
        shards = [f"consolidated.{i:02}.pth" for i in range(max(numbers, default=0) + 1)]
        return [folder / name for name in ("params.json", *shards, "tokenizer.model")]
    if layout == "hf":
        files = [folder / "config.json", *_indexed(folder, report)]
        tokenizers = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
        if not any((folder / name).is_file() for name in tokenizers):
            report.add(folder / "tokenizer.json", "is missing", "download it")
        return files
    if layout == "gguf":
        files = sorted(folder.glob("*.gguf"))
        if len(files) > 1:
            report.add(folder, f"holds {len(files)} GGUF files", "give the path of one of them")
        return [*files, *([folder] if len(files) > 1 else [])]
    report.add(folder, "holds no checkpoint", "give the folder with params.json or config.json")
    return [folder]


def _indexed(folder: Path, report: Report) -> list[Path]:
    """The safetensors files: those that the index names, or those that are there."""
    index = folder / INDEX
    if index.is_file():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            report.add(index, "names no files", AGAIN)
            return [index]
        files = {name for name in names.values() if isinstance(name, str)}
        return [index, *(folder / name for name in sorted(files))]
    found = sorted(folder.glob("*.safetensors"))
    if numbered := [m for f in found if (m := re.fullmatch(r"(.*)-\d+-of-(\d+)", f.stem))]:
        base, n = numbered[0][1], numbered[0][2]
        names = [f"{base}-{i:0{len(n)}}-of-{n}.safetensors" for i in range(1, int(n) + 1)]
        return [index, *(folder / name for name in names)] if int(n) < 10000 else [index]
    return found or [folder / "model.safetensors"]


def _read_json(path: Path) -> dict[str, Any]:
    """What it holds, or {} if that is no JSON object (`_check_files` says so)."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _check_tokenizer(folder: Path, report: Report) -> None:
    """A model of the official vocabulary has the official tokenizer.model, if it has one."""
    path, params = folder / "tokenizer.model", _read_json(folder / "params.json")
    sidecar = folder / "tokenizer.model.json"  # says itself which tokenizer it is
    if params.get("vocab_size") != OFFICIAL_VOCABULARY or sidecar.exists() or not path.is_file():
        return

    def not_official(path: Path) -> str | None:
        same = (found := digest(path, "sha256")) == TOKENIZER_SHA256
        return None if same else f"not Llama 3's: SHA-256 {found}, not {TOKENIZER_SHA256}"

    if path not in report.files:
        report.look(path, not_official)


def _check_sums(folder: Path, report: Report) -> None:
    """The MD5 sums of checklist.chk or a .md5 file, `md5  filename` or `filename md5` a line."""
    for checklist in [*folder.glob("checklist.chk"), *folder.glob("*.md5")]:
        if checklist in report.files:
            continue
        try:
            lines = checklist.read_text("utf-8", errors="replace").splitlines()
        except OSError as e:
            report.add(checklist, f"cannot be read ({e.strerror})", "check its permissions")
            continue
        for number, line in enumerate(lines, 1):
            match = SUM.fullmatch(line) or SUM.fullmatch(" ".join(reversed(line.split())))
            if match is not None:
                _check_sum(folder / match[2], match[1].lower(), checklist.name, report)
            elif line.strip():
                report.add(checklist, f"has no 'MD5 filename' on line {number}", AGAIN)


def _check_sum(file: Path, published: str, checklist: str, report: Report) -> None:
    def not_published(file: Path) -> str | None:
        same = (found := digest(file, "md5")) == published
        return None if same else f"not as published: MD5 {found}, not {published}"

    if not file.is_file():
        report.add(file, f"is missing and in {checklist}", "download it")
    elif file not in report.files:
        report.look(file, not_published)
        report.summed.add(file)


def _check_weights(path: Path, open_source: Callable[[Path], Source], report: Report) -> None:
    """It opens, the weights are those of its sizes, and every number of them is finite."""
    try:
        source = open_source(path)
        names = list(source.shapes())
    except ImportError:
        raise
    except (ValueError, OSError) as e:
        report.tell(e if str(path) in str(e) else f"{path}: {e}")
        return
    except Exception as e:  # whatever a damaged file makes a reader do
        report.tell(f"{path} cannot be opened ({type(e).__name__}: {e}); {AGAIN}")
        return
    try:
        source.args()
    except (ValueError, TypeError) as e:
        report.tell(f"{e}; get params.json (or config.json) and weights of one release")
    bad, unreadable = [], []
    if source.tied and "output.weight" in names:
        names.remove("output.weight")  # the embedding's numbers
    for name in progress(names, "checking weights", len(names), " tensors"):
        try:
            if not _is_finite(source, name):
                bad.append(name)
        except Exception as e:
            unreadable.append(f"{name} ({type(e).__name__}: {e})")
    if bad:
        report.tell(f"{path} has weights that are NaN or infinite: {_listed(bad)}; {AGAIN}")
    if unreadable:
        report.tell(f"{path} has weights that cannot be read: {_listed(unreadable)}; {AGAIN}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + f" and {len(names) - 8} more" * (len(names) > 8)


def _is_finite(source: Source, name: str) -> bool:
    """Whether every number of a weight is finite, in each shard that stores it."""
    n, dim = source.n_shards, shard_dim(name) if "." in name else None
    shape = source.shapes()[name]
    if dim is None or dim >= len(shape):
        return all(_all_finite(source.read_replicated(name, rank, n)) for rank in range(n))
    size = shape[dim]
    # A shard's part is read without a copy; KV heads may be fewer than the shards, and are small.
    whole = size % n or name.split(".")[-2] in ("wk", "wv")
    step = size if whole else size // n
    return all(_all_finite(source.read(name, dim, i, i + step)) for i in range(0, size, step or 1))


def _all_finite(w: Tensor) -> bool:
    """NaN and infinity show in the extremes; looked at in pieces, each converted to fp32."""
    rows = max(NUMBERS_AT_ONCE // max(w[0].numel() if w.dim() and len(w) else 1, 1), 1)
    for piece in w.split(rows) if w.dim() else [w]:
        if piece.numel():
            low, high = piece.float().aminmax()
            if not torch.isfinite(low) or not torch.isfinite(high):
                return False
    return True
