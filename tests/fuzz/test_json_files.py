"""Damaged JSON beside good weights: errors are clear, soon, and take little memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.checkpoints.open import open_checkpoint
from llama.checkpoints.verify import verify
from tests.fuzz.bases import base, write_base
from tests.fuzz.bounds import fuzzing, read_all, read_files
from tests.fuzz.mutations import damaged_bytes, damaged_json

FILES = [
    ("meta", "params.json", 150),
    ("meta", "tokenizer.model.json", 150),
    ("int8", "params.json", 60),
    ("int4", "params.json", 60),
    ("hf", "config.json", 200),
    ("hf", "tokenizer.json", 200),
    ("hf", "tokenizer_config.json", 60),
    ("hf", "generation_config.json", 60),
    ("hf", "model.safetensors.index.json", 60),
]


@pytest.mark.parametrize("layout", ["meta", "int8", "int4", "hf", "gguf"])
def test_the_good_files(layout: str, tmp_path: Path) -> None:
    folder = write_base(tmp_path / layout, base(layout))
    read_all(folder)
    assert verify(folder, open_checkpoint) == []


@pytest.mark.parametrize(("layout", "name", "examples"), FILES)
def test_damaged_json(layout: str, name: str, examples: int) -> None:
    files = base(layout)

    @fuzzing(examples)
    @given(damaged_json(json.loads(files[name])))
    def check(content: bytes) -> None:
        read_files(files | {name: content})

    check()


@fuzzing(30)
@given(st.data())
def test_damaged_text(data: st.DataObject) -> None:
    layout, name = data.draw(st.sampled_from([file[:2] for file in FILES]))
    content = data.draw(damaged_bytes(base(layout)[name]))
    read_files(base(layout) | {name: content})
