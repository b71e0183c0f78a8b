"""formats/gguf_header.py: equal to the gguf package; offsets, types and counts are checked."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from llama.checkpoints.formats.gguf_header import read_header
from llama.checkpoints.open import open_checkpoint
from llama.checkpoints.verify import verify
from tests.checkpoints.gguf_files import DIM, VOCAB, vocabulary_keys, weights, write_gguf

Q8 = gguf.quants.quantize(np.ones((VOCAB, DIM), np.float32), Q.Q8_0)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with keys of many types, and tensors of fp32 and, the last one, q8_0."""
    keys: dict[str, Any] = {"a.float": 0.1, "a.bool": True, "a.list": [1, -2], "general.name": "ä"}
    path = tmp_path_factory.mktemp("gguf") / "good.gguf"
    raw = {"output.weight": (Q8, Q.Q8_0)}
    write_gguf(path, keys=vocabulary_keys("smollm") | keys, raw=raw)
    return path.read_bytes()


def test_as_the_gguf_package_reads_it(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(good)
    header, oracle = read_header(path), gguf.GGUFReader(path)
    own = {key for key in oracle.fields if not key.startswith("GGUF.")}
    assert header.fields.keys() == own and len(own) > 15

    for key in own:
        assert header.fields[key].contents() == oracle.fields[key].contents(), key
    assert [(t.name, t.shape, t.kind, t.start, t.size) for t in header.tensors] == [
        (t.name, tuple(t.shape), t.tensor_type, t.data_offset, t.n_bytes) for t in oracle.tensors
    ]
    for ours, theirs in zip(header.tensors, oracle.tensors, strict=True):
        assert ours.rows().tobytes() == theirs.data.tobytes()


def after(content: bytes, name: str) -> int:
    """The position behind a name in the header."""
    stored = struct.pack("<Q", len(name)) + name.encode()
    assert content.count(stored) == 1
    return content.index(stored) + len(stored)


def with_tensor(
    name: str, kind: int | None = None, offset: int | None = None, shape: tuple[int, ...] = ()
) -> Callable[[bytes], bytes]:
    """Change what the header says about a tensor."""

    def change(content: bytes) -> bytes:
        at = after(content, name)
        [n] = struct.unpack_from("<I", content, at)
        values = list(struct.unpack_from(f"<{n}QIQ", content, at + 4))
        values[:n] = shape or values[:n]
        values[n] = values[n] if kind is None else kind
        values[n + 1] = values[n + 1] if offset is None else offset
        data = bytearray(content)
        struct.pack_into(f"<{n}QIQ", data, at + 4, *values)
        return bytes(data)

    return change


def with_bytes(name: str, skip: int, layout: str, *values: Any) -> Callable[[bytes], bytes]:
    """Overwrite what follows the key `name`, after `skip` bytes."""

    def change(content: bytes) -> bytes:
        data = bytearray(content)
        struct.pack_into(layout, data, after(content, name) + skip, *values)
        return bytes(data)

    return change


def with_counts(tensors: int, keys: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:8] + struct.pack("<QQ", tensors, keys) + content[24:]


TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "offset 33": (with_tensor("blk.0.attn_q.weight", offset=33), "is at offset 33 instead of"),
    "offset 32": (with_tensor("token_embd.weight", offset=32), "is at offset 32 instead of 0"),
    "offset of a neighbour": (with_tensor("blk.0.attn_q.weight", offset=0), "is at offset 0 inst"),
    "offset 2^64 - 1": (with_tensor("output_norm.weight", offset=2**64 - 1), "is at offset 18,446"),
    "a type of fewer bytes": (with_tensor("token_embd.weight", kind=Q.F16), "is at offset"),
    "a type of more bytes": (with_tensor("token_embd.weight", kind=Q.F64), "is at offset"),
    "q4_0 over q8_0, at the end": (with_tensor("output.weight", kind=Q.Q4_0), "bytes instead of"),
    "fp32 over q8_0, at the end": (with_tensor("output.weight", kind=Q.F32), "partial download"),
    "an unknown type": (with_tensor("output.weight", kind=99), "has type 99"),
    "parts of a block": (with_tensor("output.weight", shape=(255, VOCAB)), "not whole blocks of"),
    "no numbers": (with_tensor("output.weight", shape=(0, VOCAB)), "not whole blocks of"),
    "huge": (with_tensor("output.weight", shape=(2**63, 2**63)), "partial download"),
    "too many tensors": (with_counts(2**64 - 1, 30), "(damaged|download)"),
    "too many keys": (with_counts(20, 2**64 - 1), "(damaged|download)"),
    "a long list of text": (with_bytes(TOKENS, 8, "<Q", 2**62), "ends inside its header"),
    "a long list of numbers": (with_bytes(TYPES, 8, "<Q", 2**62), "ends inside its header"),
    "a long list of bytes": (with_bytes(TYPES, 4, "<IQ", 0, 2**31), "ends inside its header"),
    "a list of lists": (with_bytes(TYPES, 4, "<I", 9), "an array has values of type 9"),
    "a value of no type": (with_bytes("general.name", 0, "<I", 77), "has the unknown type 77"),
    "a long text": (with_bytes("general.name", 4, "<Q", 2**63), "ends inside its header"),
    "version 7": (lambda content: content[:4] + b"\7" + content[5:], "unknown GGUF version 7"),
    "more than its tensors": (lambda content: content + bytes(5000), "bytes instead of the"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(name: str, good: bytes, tmp_path: Path) -> None:
    path, (change, message) = tmp_path / "a.gguf", DAMAGE[name]
    path.write_bytes(good)
    assert verify(path, open_checkpoint) == []
    path.write_bytes(change(good))
    with pytest.raises(ValueError, match=f"a.gguf is.*{message}.*; give the path of a whole .gguf"):
        open_checkpoint(path)
    [problem] = verify(path, open_checkpoint)
    assert problem.startswith(f"{path} is ")


@pytest.mark.parametrize("alignment", [0, 3, 2**31 + 1])
def test_alignments_that_are_no_power_of_two(alignment: int, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", keys={"general.alignment": 32})
    open_checkpoint(path)
    content = path.read_bytes()
    path.write_bytes(with_bytes("general.alignment", 4, "<I", alignment)(content))
    with pytest.raises(ValueError, match=f"its alignment is {alignment}"):
        open_checkpoint(path)


def test_more_layers_than_tensors(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", keys={"llama.block_count": 2**31 - 1})
    with pytest.raises(ValueError, match=f"2147483647 layers need more than {len(weights())} w"):
        open_checkpoint(path)
