"""Checks of one file of a checkpoint: is it what its name says, is it complete, its hashes.

A check returns what is wrong as words that follow "the file is", or None. Knows no model and no
layout; a format's header is read without the format's library.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import IO, Any, BinaryIO

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
# GGUF: value type: bytes, for the types of fixed size.
GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
GGUF_STRING, GGUF_ARRAY, GGUF_UINT32 = 8, 9, 4  # value types
MAX_GGUF_KEY, MAX_GGUF_DIMS = 65535, 4  # bytes, dimensions: limits of the format
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
    """The header lists the offsets of the tensors; the file must contain the end of the last one.

    Tensors of unknown types are counted as empty.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        return None  # opening the file raises an error that names the package

    size = path.stat().st_size
    with open(path, "rb") as f:
        if f.read(4) != b"GGUF":
            return "not a GGUF file"
        try:
            tensors, data_start = _read_gguf_tensors(f)
        except (struct.error, LookupError, OverflowError, ValueError, OSError, RecursionError):
            partial = f.tell() >= size
            return "a partial download (it ends inside its header)" if partial else "damaged"
    expected = data_start
    for offset, n, kind in tensors:
        known = kind in GGMLQuantizationType._value2member_map_
        block, bytes_ = GGML_QUANT_SIZES[GGMLQuantizationType(kind)] if known else (1, 0)
        expected = max(expected, data_start + offset + n // block * bytes_)
    return _compare_sizes(size, expected) if size < expected else None  # padding may follow


def _read_gguf_tensors(f: BinaryIO) -> tuple[list[tuple[int, int, int]], int]:
    """[(offset, number of elements, type)] of the tensors; the position of offset 0 in the file."""
    _, n_tensors, n_keys = _unpack(f, "<IQQ")
    alignment = 32
    for _ in range(n_keys):
        [length] = _unpack(f, "<Q")
        if length > MAX_GGUF_KEY:
            raise ValueError("not a GGUF header")
        key = f.read(length)
        [kind] = _unpack(f, "<I")
        if key == b"general.alignment" and kind == GGUF_UINT32:
            [alignment] = _unpack(f, "<I")
        else:
            _skip_value(f, kind)
    tensors = []
    for _ in range(n_tensors):
        f.seek(_unpack(f, "<Q")[0], 1)
        [n_dims] = _unpack(f, "<I")
        if n_dims > MAX_GGUF_DIMS:
            raise ValueError("not a GGUF header")
        numbers = prod(_unpack(f, f"<{n_dims}Q"))
        kind, offset = _unpack(f, "<IQ")
        tensors.append((offset, numbers, kind))
    return tensors, -(-f.tell() // max(alignment, 1)) * max(alignment, 1)


def _unpack(f: BinaryIO, layout: str) -> tuple[int, ...]:
    """Read numbers in the layout of `struct`."""
    return struct.unpack(layout, f.read(struct.calcsize(layout)))


def _skip_value(f: BinaryIO, kind: int) -> None:
    """Move past one metadata value of type `kind`."""
    if kind == GGUF_STRING:
        f.seek(_unpack(f, "<Q")[0], 1)
    elif kind == GGUF_ARRAY:
        item, n = _unpack(f, "<IQ")
        if item in GGUF_SIZES:
            f.seek(n * GGUF_SIZES[item], 1)
        else:
            for _ in range(n):
                _skip_value(f, item)
    else:
        f.seek(GGUF_SIZES[kind], 1)
