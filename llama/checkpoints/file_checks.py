"""Checks of one file of a checkpoint: is it what its name says, is it complete, its hashes.

A check returns what is wrong as words that follow "the file is", or None. Knows no model and no
layout.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llama.checkpoints.formats.gguf_header import read_header
from llama.common.progress import progress

# Suffixes of unfinished downloads.
UNFINISHED_SUFFIXES = (
    ".incomplete", ".part", ".partial", ".tmp", ".crdownload", ".download", ".aria2",
)  # fmt: skip
# The start of a server's error message that was saved instead of the file.
SERVER_MESSAGES = (
    b"<?xml", b"<error", b'{"error"', b'{"message"', b"access to model", b"access denied",
    b"invalid username", b"repository not found", b"entry not found",
)  # fmt: skip
MAX_SAFETENSORS_HEADER = 100_000_000  # bytes, the limit of the format
MIB = 1 << 20


def find_foreign_content(path: Path) -> str | None:
    """What a file is instead of a part of a checkpoint, such as "empty" or "an HTML page".

    None: it may be what its name says. Reads the first 4 kB.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as f:
        head = f.read(4096)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "empty"
    if head.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page"
    if text.startswith(SERVER_MESSAGES):
        return "a message of the server"
    return None


def find_damage(path: Path) -> str | None:
    """`find_foreign_content`, then whether the file is complete according to its header.

    Raises:
        OSError: the file cannot be read.
    """
    if wrong := find_foreign_content(path):
        return wrong
    check = {
        ".pth": _check_pth, ".safetensors": _check_safetensors, ".gguf": _check_gguf,
        ".json": _check_json,
    }  # fmt: skip
    kind = path.suffix.lower()
    return check[kind](path) if kind in check else None


def file_hash(path: Path, algorithm: str) -> str:
    """The hash of a file in hexadecimal, by an algorithm of hashlib; shows a progress bar.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as f:
        for block in progress(_blocks(f), f"{algorithm} of {path.name}", _mebibytes(path), " MiB"):
            digest.update(block)
    return digest.hexdigest()


def find_corrupt_entry(path: Path) -> str | None:
    """Compare the entries of a torch checkpoint with their CRC-32; shows a progress bar.

    Entries with CRC 0 are skipped: torch can be set to compute none.

    Raises:
        OSError: the file cannot be read.
    """
    if not zipfile.is_zipfile(path):
        return None  # from before torch 1.6
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.CRC != 0]
        blocks = (block for entry in entries for block in _read_entry(archive, entry))
        try:
            for _ in progress(blocks, f"crc32 of {path.name}", _mebibytes(path), " MiB"):
                pass
        except ValueError as e:
            return f"damaged ({e} has another CRC-32 than when it was written)"
    return None


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """Blocks of an entry; a ValueError with its name if its CRC-32 is wrong."""
    try:
        with archive.open(entry) as f:
            yield from _blocks(f)
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, struct.error, zlib.error):
        raise ValueError(entry.filename) from None


def _blocks(f: IO[bytes]) -> Iterator[bytes]:
    while block := f.read(MIB):
        yield block


def _mebibytes(path: Path) -> int:
    return -(-path.stat().st_size // MIB)


def is_gguf(path: Path) -> bool:
    """Whether a file starts as a GGUF, whatever its name; False if it cannot be read."""
    try:
        with open(path, "rb") as f:
            return f.read(4) == b"GGUF"
    except OSError:
        return False


def _check_json(path: Path) -> str | None:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return "not JSON"
    return None


def _check_pth(path: Path) -> str | None:
    """A torch checkpoint is a zip archive; its table of contents is at the end."""
    with open(path, "rb") as f:
        magic = f.read(4)
    if magic[:2] in (b"\x80\x02", b"\x80\x04"):
        return None  # a pickle, from before torch 1.6: checked when it is opened
    if magic != b"PK\x03\x04":
        return "not a torch checkpoint"
    if not zipfile.is_zipfile(path):
        return "a partial download (a torch checkpoint without its end)"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "a damaged torch checkpoint"
    return None if any(n.endswith("data.pkl") for n in names) else "a zip archive of something else"


def _check_safetensors(path: Path) -> str | None:
    size = path.stat().st_size
    with open(path, "rb") as f:
        start = f.read(8)
        n = int.from_bytes(start, "little")
        if n > MAX_SAFETENSORS_HEADER:
            return "not a safetensors file"
        header = f.read(n)
    if len(start) < 8 or len(header) < n:
        return "a partial download (it ends inside its header)"
    try:
        tensors: dict[str, Any] = json.loads(header)
        ends = [int(t["data_offsets"][1]) for k, t in tensors.items() if k != "__metadata__"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "not a safetensors file"
    return _compare_sizes(size, 8 + n + max(ends, default=0))


def _compare_sizes(size: int, expected: int) -> str | None:
    if size < expected:
        return f"a partial download ({size:,} of {expected:,} bytes)"
    if size > expected:
        return f"damaged ({size:,} bytes instead of the {expected:,} of its header)"
    return None


def _check_gguf(path: Path) -> str | None:
    try:
        read_header(path)
    except ValueError as e:
        return str(e)
    except ImportError:
        pass  # opening the file raises an error that names the package
    return None
