"""Damaged weights and vocabularies: errors are clear, soon, and take little memory."""

from __future__ import annotations

import io
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.checkpoints.gguf_files import KEYS, vocabulary_keys
from tests.fuzz.bases import GGUF_KEYS, archive_of, base, records_of, write_gguf_with
from tests.fuzz.bounds import fuzzing, read_all, read_files
from tests.fuzz.mutations import HOSTILE, damaged_bytes, damaged_json

FILES = [
    ("meta", "consolidated.00.pth", 100),
    ("int4", "consolidated.00.pth", 40),
    ("hf", "model-00001-of-00002.safetensors", 100),
    ("gguf", "a.gguf", 150),
    ("meta", "tokenizer.model", 60),
]


@pytest.mark.parametrize(("layout", "name", "examples"), FILES)
def test_damaged_bytes(layout: str, name: str, examples: int) -> None:
    files = base(layout)

    @fuzzing(examples)
    @given(damaged_bytes(files[name]))
    def check(content: bytes) -> None:
        read_files(files | {name: content})

    check()


@fuzzing(150)
@given(st.data())
def test_damaged_records_of_torch(data: st.DataObject) -> None:
    """Most of them in the pickle, which a bare change of bytes would not get past its CRC-32."""
    layout = data.draw(st.sampled_from(["meta", "meta", "int8"]))
    records = records_of(base(layout)["consolidated.00.pth"])
    names = sorted(records)
    name = data.draw(st.sampled_from([n for n in names if n.endswith("data.pkl")] * 9 + names))
    records[name] = data.draw(damaged_bytes(records[name]))
    read_files(base(layout) | {"consolidated.00.pth": archive_of(records)})


def tensors() -> st.SearchStrategy[Any]:
    """Values that are no weights, and weights of other kinds."""
    plain = [
        torch.ones(2, 3), torch.ones(0, 4), torch.ones(()), torch.ones(1).expand(2**40),
        torch.ones(4, 4).T, torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(),
        torch.ones(2, device="meta"), torch.ones(3).to(torch.float8_e4m3fn),
        torch.ones(2, dtype=torch.complex64),
        torch.nn.Parameter(torch.ones(2)), torch.full((32,), float("nan")),
    ]  # fmt: skip
    return st.sampled_from([*plain, *HOSTILE])


@fuzzing(60)
@given(st.data())
def test_other_values_in_a_state_dict(data: st.DataObject) -> None:
    weights: dict[Any, Any] = torch.load(
        io.BytesIO(base("meta")["consolidated.00.pth"]), weights_only=True
    )
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from([*weights, "", 7, "layers.0", "layers.99999.a.weight"]))
        weights[key] = data.draw(tensors())
    file = io.BytesIO()
    old = data.draw(st.booleans())
    try:
        torch.save(weights, file, _use_new_zipfile_serialization=not old)
    except (RuntimeError, NotImplementedError, AttributeError, pickle.PicklingError):
        return  # torch cannot save it so
    read_files(base("meta") | {"consolidated.00.pth": file.getvalue()})


@fuzzing(100)
@given(st.data())
def test_damaged_headers_of_safetensors(data: st.DataObject) -> None:
    name = "model-00001-of-00002.safetensors"
    content = base("hf")[name]
    size = int.from_bytes(content[:8], "little")
    header = data.draw(damaged_json(json.loads(content[8 : 8 + size])))
    damaged = len(header).to_bytes(8, "little") + header + content[8 + size :]
    read_files(base("hf") | {name: damaged})


GGUF_VALUES: list[Any] = [
    None, True, 0, 1, 2**31, 2**32 - 1, -1.0, 0.0, 1e38, float("nan"), float("inf"), "", "x", "\n",
    "x" * 10_000, [1], [0.5], ["x"], ["a b"] * 3, ["x"] * 10_000, [2**30] * 500,
]  # fmt: skip


@fuzzing(100)
@given(st.data())
def test_other_values_of_gguf_keys(data: st.DataObject) -> None:
    more = ["split.count", "llama.rope.scaling.type", "tokenizer.ggml.add_bos_token",
            "tokenizer.ggml.padding_token_id", "tokenizer.ggml.eot_token_id"]  # fmt: skip
    known = KEYS | vocabulary_keys("smollm") | GGUF_KEYS
    keys = data.draw(
        st.dictionaries(
            st.sampled_from([*known, *more]), st.sampled_from(GGUF_VALUES), min_size=1, max_size=3
        )
    )
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "fuzzed-model"
        path.mkdir()
        try:
            write_gguf_with(path / "a.gguf", keys)
        except (ValueError, TypeError, AttributeError, OverflowError):
            return  # the gguf package cannot write it
        read_all(path)
