"""The header of a GGUF file: metadata and places of the tensors, compared with the file's size.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Knows no model.
The reader of the `gguf` package checks no bounds, and takes a kilobyte for each token.
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

STRING, ARRAY = 8, 9  # value types
# The other value types: their letter in `struct`.
SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
VERSIONS = (2, 3)
MAX_KEY, MAX_DIMS = 65535, 4  # bytes, dimensions: limits of the format
MAX_HEADER = 1 << 28  # bytes; vocabularies and templates have less than a tenth
MAX_TRAILING = 4096  # bytes after the last tensor: padding


class Field(NamedTuple):
    """A value of the metadata; strings are bytes."""

    value: Any

    def contents(self) -> Any:
        """The value, with strings as text; a UnicodeDecodeError if one is not."""
        if isinstance(self.value, list):
            return [v.decode() if isinstance(v, bytes) else v for v in self.value]
        return self.value.decode() if isinstance(self.value, bytes) else self.value


class StoredTensor(NamedTuple):
    """Where a tensor is stored.

    Attributes:
        shape: innermost dimension first, as in the file.
        kind: a number of `gguf.GGMLQuantizationType`.
        start, size: bytes.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    size: int

    def rows(self) -> np.ndarray:
        """The stored bytes, mapped: (..., bytes of a row)."""
        import numpy as np

        data = np.memmap(self.path, np.uint8, "r", self.start, (self.size,))
        return data.reshape(*self.shape[:0:-1], -1)

    def array(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A copy in fp32 of rows `start`:`stop`, with the outermost dimension first.

        Raises:
            NotImplementedError: the `gguf` package cannot read this type; its name.
        """
        import numpy as np
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind, is_vector = GGMLQuantizationType(self.kind), len(self.shape) == 1
        stored = self.rows()
        try:
            values = dequantize(stored if is_vector else stored[start:stop], kind)
        except NotImplementedError:
            raise NotImplementedError(f"type {kind.name}") from None
        values = values[start:stop] if is_vector else values
        return np.require(values, np.float32, ["C", "W"]).reshape(-1, *self.shape[-2::-1])


class GGUFHeader(NamedTuple):
    """Metadata by key, and the tensors in the order of the file."""

    fields: dict[str, Field]
    tensors: list[StoredTensor]


class _Reader:
    """Numbers and strings of an open file; a ValueError where the file has fewer bytes."""

    def __init__(self, f: IO[bytes], size: int):
        self.f, self.position, self.end = f, 0, min(size, MAX_HEADER)

    def read(self, n: int) -> bytes:
        self.position += n  # counted here: `f.tell` takes longer than all the rest
        if self.position > self.end:
            raise ValueError("a partial download or damaged (it ends inside its header)")
        return self.f.read(n)

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """Numbers in the layout of `struct`."""
        return struct.unpack(layout, self.read(struct.calcsize(layout)))

    def string(self) -> bytes:
        return self.read(self.unpack("<Q")[0])

    def name(self) -> str:
        [length] = self.unpack("<Q")
        if length > MAX_KEY:
            raise ValueError(f"damaged (a name has {length:,} bytes)")
        try:
            return self.read(length).decode()
        except UnicodeDecodeError as e:
            raise ValueError(f"damaged (a name is not text: {e})") from None

    def value(self, kind: int) -> Any:
        """A value of the metadata."""
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.unpack(f"<{SCALARS[kind]}")[0]
        if kind != ARRAY:
            raise ValueError(f"damaged (a value has the unknown type {kind})")
        item, n = self.unpack("<IQ")
        if item == STRING:
            return [self.string() for _ in range(n)]
        if item not in SCALARS:
            raise ValueError(f"damaged (an array has values of type {item})")
        letter = SCALARS[item]
        data = self.read(n * struct.calcsize(f"<{letter}"))
        return list(struct.unpack(f"<{n}{letter}", data))


def read_header(path: Path) -> GGUFHeader:
    """The header of a GGUF file.

    Tensors follow each other in the order of the header, each padded to the file's alignment, as
    llama.cpp requires: a wrong offset or type shows as a gap or as an overlap.

    Raises:
        ValueError: words that follow "the file is", such as "a partial download (...)".
        OSError: the file cannot be read.
        ImportError: the `gguf` package is missing.
    """
    size = path.stat().st_size
    with open(path, "rb") as f:
        reader = _Reader(f, size)
        if size < 4 or reader.read(4) != b"GGUF":
            raise ValueError("not a GGUF file")
        [version] = reader.unpack("<I")
        if version & 0xFFFF == 0:
            raise ValueError("of the other byte order (gguf-convert-endian converts it)")
        if version not in VERSIONS:
            raise ValueError(f"of the unknown GGUF version {version}")
        n_tensors, n_keys = reader.unpack("<QQ")
        fields = _read_fields(reader, n_keys)
        found = [_read_tensor(reader, path) for _ in range(n_tensors)]
        alignment = fields["general.alignment"].value if "general.alignment" in fields else 32
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"damaged (its alignment is {alignment})")
        start = _padded(reader.position, alignment)
    if len({tensor.name for tensor in found}) < len(found):
        raise ValueError("damaged (two tensors have one name)")
    return GGUFHeader(fields, _place(found, start, alignment, size))


def _read_fields(reader: _Reader, n: int) -> dict[str, Field]:
    fields: dict[str, Field] = {}
    for _ in range(n):
        key = reader.name()
        if key in fields:
            raise ValueError(f"damaged (it has the key {key!r} twice)")
        fields[key] = Field(reader.value(reader.unpack("<I")[0]))
    return fields


def _read_tensor(reader: _Reader, path: Path) -> StoredTensor:
    """A tensor as the file lists it: `start` is from the end of the header."""
    name = reader.name()
    [n_dims] = reader.unpack("<I")
    if not 1 <= n_dims <= MAX_DIMS:
        raise ValueError(f"damaged ({name!r} has {n_dims} dimensions)")
    shape = reader.unpack(f"<{n_dims}Q")
    kind, offset = reader.unpack("<IQ")
    return StoredTensor(path, name, shape, kind, offset, _bytes(name, shape, kind))


def _bytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor, whose rows are whole blocks."""
    from gguf import GGML_QUANT_SIZES

    sizes = {int(known): size for known, size in GGML_QUANT_SIZES.items()}
    if kind not in sizes:
        raise ValueError(f"damaged, or newer than the gguf package ({name!r} has type {kind})")
    block, size = sizes[kind]
    if min(shape) < 1 or shape[0] % block:
        raise ValueError(f"damaged ({name!r} of shape {shape} is not whole blocks of {block})")
    return prod(shape) // int(block) * int(size)


def _place(
    tensors: list[StoredTensor], start: int, alignment: int, size: int
) -> list[StoredTensor]:
    """The tensors with their positions in the file, if they follow each other to its end."""
    placed, end = [], start
    for tensor in tensors:
        expected = _padded(end, alignment)
        if start + tensor.start != expected:
            raise ValueError(
                f"damaged ({tensor.name!r} is at offset {tensor.start:,} instead of "
                f"{expected - start:,})"
            )
        placed.append(tensor._replace(start=expected))
        end = expected + tensor.size
    if size < end:
        raise ValueError(f"a partial download ({size:,} of {end:,} bytes)")
    if tensors and size - end > MAX_TRAILING:
        raise ValueError(f"damaged ({size:,} bytes instead of the {end:,} of its header)")
    return placed


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
