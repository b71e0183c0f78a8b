"""What is wrong with one file of a checkpoint, in plain words. `damage` reads headers only."""

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

# A download that is not finished is often named so.
UNFINISHED = (".incomplete", ".part", ".partial", ".tmp", ".crdownload", ".download", ".aria2")
# How a server's refusal begins when it was saved in place of the file it refused.
SERVER_MESSAGES = (
    b"<?xml", b"<error", b'{"error"', b'{"message"', b"access to model", b"access denied",
    b"invalid username", b"repository not found", b"entry not found",
)  # fmt: skip
MAX_SAFETENSORS_HEADER = 100_000_000  # bytes, the limit that the format sets itself
# GGUF: value type -> bytes, and the two that have no fixed size.
GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
GGUF_STRING, GGUF_ARRAY, GGUF_UINT32 = 8, 9, 4
MAX_GGUF_KEY, MAX_GGUF_DIMS = 65535, 4  # bytes, dimensions: the format's limits
MIB = 1 << 20


def recognise(path: Path) -> str | None:
    """What a file is that is no part of a checkpoint at all: "empty", "an HTML page",
    "a Git-LFS pointer" or "a message of the server"; None: it may be what its name says.

    Reads the first 4 kB.

    Raises:
        OSError: it cannot be read.
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


def damage(path: Path) -> str | None:
    """`recognise`, and whether the file is whole by its own account.

    Raises:
        OSError: it cannot be read.
    """
    if wrong := recognise(path):
        return wrong
    check = {".pth": _pth, ".safetensors": _safetensors, ".gguf": _gguf, ".json": _json}
    return check[path.suffix](path) if path.suffix in check else None


def digest(path: Path, kind: str) -> str:
    """The hash of a file, with a progress bar.

    Raises:
        OSError: it cannot be read.
    """
    made = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as f:
        for block in progress(_blocks(f), f"{kind} of {path.name}", _size(path), " MiB"):
            made.update(block)
    return made.hexdigest()


def damaged_entry(path: Path) -> str | None:
    """Whether what a torch checkpoint holds is what was written, with a progress bar.

    Each entry has a CRC-32, or 0 where torch was told to compute none.

    Raises:
        OSError: it cannot be read.
    """
    if not zipfile.is_zipfile(path):
        return None  # from before torch 1.6
    with zipfile.ZipFile(path) as archive:
        made = [entry for entry in archive.infolist() if entry.CRC != 0]
        read = (block for entry in made for block in _entry(archive, entry))
        try:
            for _ in progress(read, f"crc32 of {path.name}", _size(path), " MiB"):
                pass
        except ValueError as e:
            return f"damaged ({e} is not as it was written)"
    return None


def _entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Iterator[bytes]:
    """What it holds; a ValueError that names it if that has another CRC-32."""
    try:
        with archive.open(entry) as f:
            yield from _blocks(f)
    except (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, struct.error, zlib.error):
        raise ValueError(entry.filename) from None


def _blocks(f: IO[bytes]) -> Iterator[bytes]:
    while block := f.read(MIB):
        yield block


def _size(path: Path) -> int:
    """In MiB."""
    return -(-path.stat().st_size // MIB)


def is_gguf(path: Path) -> bool:
    """Whether a file says that it is one, whatever its name."""
    try:
        with open(path, "rb") as f:
            return f.read(4) == b"GGUF"
    except OSError:
        return False


def _json(path: Path) -> str | None:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return "not JSON"
    return None


def _pth(path: Path) -> str | None:
    """A torch checkpoint is a zip archive, whose table of contents comes last."""
    with open(path, "rb") as f:
        magic = f.read(4)
    if magic[:2] in (b"\x80\x02", b"\x80\x04"):
        return None  # a checkpoint from before torch 1.6, a pickle: opening it will tell
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


def _safetensors(path: Path) -> str | None:
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
    return _compare(size, 8 + n + max(ends, default=0))


def _compare(size: int, expected: int) -> str | None:
    if size < expected:
        return f"a partial download ({size:,} of {expected:,} bytes)"
    if size > expected:
        return f"damaged ({size:,} bytes where its header counts {expected:,})"
    return None


def _gguf(path: Path) -> str | None:
    """The header lists the tensors and where each begins; the file must reach the last one's end.

    Tensors of a kind this does not know are taken to be empty.
    """
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        return None  # opening it will ask for the package

    size = path.stat().st_size
    with open(path, "rb") as f:
        if f.read(4) != b"GGUF":
            return "not a GGUF file"
        try:
            ends, begin = _gguf_tensors(f)
        except (struct.error, LookupError, OverflowError, ValueError, OSError, RecursionError):
            partial = f.tell() >= size
            return "a partial download (it ends inside its header)" if partial else "damaged"
    expected = begin
    for offset, n, kind in ends:
        known = kind in GGMLQuantizationType._value2member_map_
        block, bytes_ = GGML_QUANT_SIZES[GGMLQuantizationType(kind)] if known else (1, 0)
        expected = max(expected, begin + offset + n // block * bytes_)
    return _compare(size, expected) if size < expected else None  # padding may follow


def _gguf_tensors(f: BinaryIO) -> tuple[list[tuple[int, int, int]], int]:
    """[(offset, numbers, kind)] of the tensors, and where in the file offset 0 is."""
    _, n_tensors, n_keys = _unpack(f, "<IQQ")
    alignment = 32
    for _ in range(n_keys):
        [length] = _unpack(f, "<Q")
        if length > MAX_GGUF_KEY:
            raise ValueError("no GGUF header")
        key = f.read(length)
        [kind] = _unpack(f, "<I")
        if key == b"general.alignment" and kind == GGUF_UINT32:
            [alignment] = _unpack(f, "<I")
        else:
            _skip(f, kind)
    tensors = []
    for _ in range(n_tensors):
        f.seek(_unpack(f, "<Q")[0], 1)
        [n_dims] = _unpack(f, "<I")
        if n_dims > MAX_GGUF_DIMS:
            raise ValueError("no GGUF header")
        numbers = prod(_unpack(f, f"<{n_dims}Q"))
        kind, offset = _unpack(f, "<IQ")
        tensors.append((offset, numbers, kind))
    return tensors, -(-f.tell() // max(alignment, 1)) * max(alignment, 1)


def _unpack(f: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(form, f.read(struct.calcsize(form)))


def _skip(f: BinaryIO, kind: int) -> None:
    """Step over one value."""
    if kind == GGUF_STRING:
        f.seek(_unpack(f, "<Q")[0], 1)
    elif kind == GGUF_ARRAY:
        item, n = _unpack(f, "<IQ")
        if item in GGUF_SIZES:
            f.seek(n * GGUF_SIZES[item], 1)
        else:
            for _ in range(n):
                _skip(f, item)
    else:
        f.seek(GGUF_SIZES[kind], 1)
