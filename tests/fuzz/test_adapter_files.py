"""Damaged adapters: errors are clear, soon, and take little memory."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given

from llama.checkpoints.adapter import adapter_shapes, read_adapter, write_adapter
from llama.checkpoints.adapter_report import adapter_problems, describe_folder
from llama.checkpoints.open import open_checkpoint
from llama.layers.lora import LoRAConfig
from tests.fuzz.bases import Files, base, write_base
from tests.fuzz.bounds import bounds, fuzzing
from tests.fuzz.mutations import damaged_bytes, damaged_json

CONFIG = LoRAConfig(2, 4, targets=("wq", "w2"), dora=True)


@functools.cache
def good() -> Files:
    """The files of an adapter of the base in Meta's layout, with an embedding of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        source = open_checkpoint(write_base(Path(temporary) / "meta", base("meta")))
        args, folder = source.args(), Path(temporary) / "adapter"
        shapes = adapter_shapes(CONFIG, {"tok_embeddings.weight": args.vocab_size}, args)
        tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
        whole = {"tok_embeddings.weight": tensors.pop("tok_embeddings.weight")}
        folder.mkdir()
        write_adapter(folder, source, CONFIG, tensors, whole=whole)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(changes: Files) -> None:
    """Read an adapter as build, inspect and verify do, within bounds."""
    with tempfile.TemporaryDirectory() as temporary:
        source = open_checkpoint(write_base(Path(temporary) / "meta", base("meta")))
        folder = write_base(Path(temporary) / "fuzzed-adapter", good() | changes)
        with bounds():
            for step in (lambda: read_adapter(folder, source), lambda: describe_folder(folder)):
                try:
                    step()
                except (ValueError, OSError) as e:
                    assert "fuzzed-adapter" in str(e) and len(str(e)) < 3000, repr(e)[:3000]
            for problem in adapter_problems(folder):
                assert "fuzzed-adapter" in problem and "\n" not in problem


def test_the_good_files() -> None:
    read({})
    with tempfile.TemporaryDirectory() as temporary:
        assert adapter_problems(write_base(Path(temporary) / "adapter", good())) == []


@pytest.mark.parametrize(
    ("name", "examples"), [("adapter_config.json", 60), ("llama3_adapter.json", 10)]
)
def test_damaged_json(name: str, examples: int) -> None:
    @fuzzing(examples)
    @given(damaged_json(json.loads(good()[name])))
    def check(content: bytes) -> None:
        read({name: content})

    check()


@fuzzing(40)
@given(damaged_bytes(good()["adapter_model.safetensors"]))
def test_damaged_tensors(content: bytes) -> None:
    read({"adapter_model.safetensors": content})
