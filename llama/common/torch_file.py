"""Files of `torch.save`, compared with their own directory before torch reads them.

torch maps a record at the place that the archive names and takes as many bytes as the pickle says:
a shorter record would get its neighbour's numbers. Knows no model.
"""

from __future__ import annotations

import errno
import math
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from llama.common.files import check_regular_file, damage

AGAIN = "get or make it again"
ZIP_MAGIC, PICKLE_MAGIC = b"PK\x03\x04", b"\x80\x02"  # since torch 1.6, and before
LOCAL_HEADER = struct.Struct("<26xHH")  # ends with the lengths of the name and of the extra field
OLD_PICKLES = 5  # before 1.6: magic number, version, platform, the object, keys of the storages
# Types of storages: bytes of an element.
STORAGES = {
    "torch DoubleStorage": 8, "torch FloatStorage": 4, "torch HalfStorage": 2,
    "torch BFloat16Storage": 2, "torch LongStorage": 8, "torch IntStorage": 4,
    "torch ShortStorage": 2, "torch CharStorage": 1, "torch ByteStorage": 1,
    "torch BoolStorage": 1, "torch.storage UntypedStorage": 1,
    "torch ComplexFloatStorage": 8, "torch ComplexDoubleStorage": 16,
}  # fmt: skip
ORDERED_DICT = "collections OrderedDict"
COUNTER, SET, BYTES = "collections Counter", "__builtin__ set", "_codecs encode"
# What the pickle may call: plain tensors, parameters, dicts of them, and plain values beside them.
TENSORS = {"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"}
CALLS = TENSORS | {
    "torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state",
    "torch Size", ORDERED_DICT, COUNTER, SET, BYTES, "__builtin__ complex", "torch device",
}  # fmt: skip
# Tensors of another kind: word for the message.
OTHER_TENSORS = {
    "torch._utils _rebuild_sparse_tensor": "sparse",
    "torch._utils _rebuild_nested_tensor": "nested",
    "torch._utils _rebuild_meta_tensor_no_storage": "empty (on the meta device)",
    "torch._utils _rebuild_qtensor": "quantized",
    "torch._utils _rebuild_wrapper_subclass": "wrapped",
    "torch._tensor _rebuild_from_type_v2": "wrapped",
}
CONSTANTS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING",
}  # fmt: skip
TUPLES = {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
# Other opcodes of torch, whose result is not looked at.
OPAQUE = {"NONE", "NEWTRUE", "NEWFALSE", "EMPTY_SET"}
MAX_KEY = 16  # items of a tuple that is a key
USED = object()  # in a list that was made a set: one list in many sets could take all memory


class CodeError(ValueError):
    """A pickle refers to something that is not a tensor and could be code."""


class _Name(str):
    """A global of a pickle, "module name"."""


class _Storage(NamedTuple):
    """A storage of a pickle: bytes, and bytes of an element."""

    size: int
    itemsize: int


def load_torch(path: Path, mmap: bool = False) -> Any:
    """The content of a file of `torch.save`: plain tensors in dicts, lists and tuples, on the CPU.

    No code of the file is run.

    Args:
        mmap: tensors are read from the disk when they are used. Files from before torch 1.6 are
            read as a whole all the same.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or contains something else than plain tensors.
        OSError: the disk cannot read it.
    """
    check_regular_file(path)
    with damage(path, AGAIN):
        is_zip = _check_file(path)
        try:
            return torch.load(path, map_location="cpu", mmap=mmap and is_zip, weights_only=True)
        except OSError as e:
            if is_disk_error(e):
                raise
            raise ValueError(str(e)) from None


def is_disk_error(e: Exception) -> bool:
    """Whether an error of `torch.load` is one of the disk. EINVAL means a truncated file."""
    return isinstance(e, OSError) and e.errno != errno.EINVAL


def _check_file(path: Path) -> bool:
    """Compare the parts of a file; whether it is a zip archive, as since torch 1.6."""
    with open(path, "rb") as f:
        magic = f.read(4)
        try:
            if magic == ZIP_MAGIC:
                _check_archive(f)
            elif magic[:2] == PICKLE_MAGIC:
                _check_old_file(f)
            else:
                raise ValueError(f"{path} is not a torch checkpoint; {AGAIN}")
        except CodeError as e:
            raise ValueError(
                f"{path} contains more than weights and could run code when loaded; it was "
                f"refused. Get the official file, or save the state dict alone. (It refers to {e})"
            ) from None
    return magic == ZIP_MAGIC


def _check_archive(f: IO[bytes]) -> None:
    """Check that no record overlaps another, and that each storage's record contains all of it."""
    with zipfile.ZipFile(f) as archive:
        records = sorted(archive.infolist(), key=lambda record: record.header_offset)
        ends = [*(record.header_offset for record in records[1:]), archive.start_dir]
    starts: dict[str, int] = {}
    for record, end in zip(records, ends, strict=True):
        f.seek(max(record.header_offset, 0))
        start = f.tell() + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(f.read(LOCAL_HEADER.size)))
        if record.compress_type != zipfile.ZIP_STORED or start + record.file_size > end:
            raise ValueError(f"its record {record.filename!r} is compressed or overlaps the next")
        starts[record.filename] = start
    found = {record.filename: record for record in records}
    pickles = [name for name in found if name.endswith("/data.pkl")]
    if len(found) < len(records) or len(pickles) != 1:
        raise ValueError("two of its records have one name, or it has no data.pkl")
    f.seek(starts[pickles[0]])
    content = f.read(found[pickles[0]].file_size)
    if found[pickles[0]].CRC not in (0, zlib.crc32(content)):  # 0: torch was set to compute none
        raise ValueError("its data.pkl has another CRC-32 than when it was written")
    folder = pickles[0].removesuffix("data.pkl")
    for key, size in find_storages(content).items():
        stored = entry.file_size if (entry := found.get(f"{folder}data/{key}")) else 0
        if stored < size:
            raise ValueError(f"its record data/{key} has {stored:,} of {size:,} bytes")


def _check_old_file(f: IO[bytes]) -> None:
    """Check that the storages fit into the file; each follows its number of elements."""
    f.seek(0)
    sizes: dict[str, int] = {}
    for _ in range(OLD_PICKLES):
        sizes |= find_storages(f)
    start = f.tell()
    if start + sum(8 + size for size in sizes.values()) > f.seek(0, 2):
        raise ValueError("it ends inside its weights")


def find_storages(pickle: bytes | IO[bytes]) -> dict[str, int]:
    """{key: bytes} of the storages that a pickle of `torch.save` refers to. Calls nothing.

    Raises:
        CodeError: the pickle refers to something else than plain tensors.
        ValueError: it is damaged, or a tensor has more numbers than its storage.
    """
    stack: list[Any] = []
    marks: list[int] = []  # heights of the stack
    memo: dict[int, Any] = {}
    sizes: dict[str, int] = {}
    arg: Any
    for opcode, arg, _ in pickletools.genops(pickle):
        name = opcode.name
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[int(arg)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(arg)])
        elif name == "GLOBAL":
            stack.append(_check_global(arg))
        elif name in CONSTANTS:
            stack.append(arg)
        elif name not in ("PROTO", "STOP"):
            items = _pop(stack, marks, opcode)
            if name == "BINPERSID":
                key, result = _read_storage(*items[0])
                sizes[key] = max(sizes.get(key, 0), result.size)
            else:
                result = _result(name, items)
            if opcode.stack_after:
                stack.append(result)
    return sizes


def _pop(stack: list[Any], marks: list[int], opcode: pickletools.OpcodeInfo) -> list[Any]:
    """Remove what `opcode` takes from the stack, and the mark; return it from the bottom up."""
    before = opcode.stack_before
    if pickletools.markobject in before:
        first = marks.pop() - before.index(pickletools.markobject)
    else:
        first = len(stack) - len(before)
    if first < 0:
        raise ValueError("its pickle has an empty stack")
    items = stack[first:]
    del stack[first:]
    return items


def _check_global(name: str) -> _Name:
    """`name`, if a pickle may refer to it."""
    if name in OTHER_TENSORS:
        raise ValueError(f"it has {OTHER_TENSORS[name]} tensors instead of plain ones")
    if name not in CALLS and name not in STORAGES and _dtype(name) is None:
        raise CodeError(name.replace(" ", "."))
    return _Name(name)


def _dtype(name: object) -> torch.dtype | None:
    module, _, attribute = str(name).partition(" ")
    found = getattr(torch, attribute, None) if module == "torch" else None
    return found if isinstance(found, torch.dtype) else None


def _read_storage(
    _: object, kind: object, key: object, place: object, n: object, *more: object
) -> tuple[str, _Storage]:
    """(key, storage) of the tuple with which a pickle refers to a storage of `n` elements."""
    if type(kind) is not _Name or type(key) is not str or type(n) is not int or n < 0:
        raise ValueError("a storage has no type, name or size")
    return key, _Storage(n * STORAGES[kind], STORAGES[kind])


def _result(name: str, items: list[Any]) -> Any:
    """What the opcode `name` puts on the stack, as far as later opcodes need it."""
    if name in TUPLES:
        return tuple(items)
    if name in ("REDUCE", "BUILD"):
        called, args = items
        if type(called) is not _Name or called not in CALLS:
            raise ValueError("it calls something that is not a function")
        if called in TENSORS:
            _check_tensor(*args)
        if called in (COUNTER, SET):
            _check_set(*args)
        if called == BYTES and args[1:] != ("latin1",):
            raise ValueError("its bytes are not latin1")
        if called == ORDERED_DICT and name == "REDUCE" and args != ():
            raise ValueError("its dict is damaged")
        if called != ORDERED_DICT and name == "BUILD":
            raise ValueError("it sets the state of something else than a dict")
        return called if called == ORDERED_DICT else None
    if name in ("SETITEM", "SETITEMS"):
        if not all(map(_is_key, items[1::2])):
            raise ValueError("a key of a dict is neither text nor a number, nor a few of them")
        if type(items[0]) is list:
            items[0].extend(items[1::2])
        return items[0]
    if name in ("EMPTY_LIST", "EMPTY_DICT"):
        return []  # of the items, or of the keys
    if name in ("APPEND", "APPENDS"):
        if type(items[0]) is not list:
            raise ValueError("it adds to something that is not a list")
        items[0].extend(items[1:])
        return items[0]
    if name not in OPAQUE:
        raise ValueError(f"opcode {name} is not one of torch's")
    return None


def _check_tensor(storage: _Storage, start: int, shape: tuple[int, ...], *more: object) -> None:
    """Check that a tensor has no more numbers than are stored: one could claim to be 2^40."""
    dtype = _dtype(more[3]) if len(more) > 3 else None  # of `_rebuild_tensor_v3`
    size = math.prod(shape) * (dtype.itemsize if dtype else storage.itemsize)
    if min(shape, default=0) < 0 or size > storage.size:
        raise ValueError(f"a tensor of shape {shape} has {storage.size:,} of {size:,} bytes")


def _is_key(key: object) -> bool:
    """Whether `key` takes little time to hash: nested tuples could take 2^40 steps."""
    items = key if type(key) is tuple and len(key) <= MAX_KEY else (key,)
    return all(type(item) in (str, int, float, type(None)) for item in items)


def _check_set(items: list[Any]) -> None:
    if type(items) is not list or not all(map(_is_key, items)):
        raise ValueError("it has a set of something else than texts and numbers")
    items.append(USED)
