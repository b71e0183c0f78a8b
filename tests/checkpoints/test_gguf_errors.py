"""Errors of formats/gguf.py: files that are not GGUF, damaged, or not a plain Llama."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from tests.checkpoints.gguf_files import (
    DIM,
    HIDDEN,
    KEYS,
    VOCAB,
    read_params,
    read_tensors,
    read_tokenizer,
    vocabulary_keys,
    weights,
    write_gguf,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied fp32 model with a vocabulary."""
    path = tmp_path_factory.mktemp("gguf") / "plain.gguf"
    return write_gguf(path, keys=vocabulary_keys("smollm"))


REQUIRED = [key for key in KEYS if key.startswith("llama.") and "kv" not in key]
REQUIRED.remove("llama.rope.freq_base")


def without(name: str) -> dict[str, np.ndarray]:
    """The weights without one."""
    return {key: w for key, w in weights().items() if key != name}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.architecture": "qwen2"}, "architecture 'qwen2'"),
        *[({key: None}, f"no '{key}'") for key in REQUIRED],
        ({"llama.block_count": 0}, "block_count must be .* not 0"),
        ({"llama.feed_forward_length": [HIDDEN, HIDDEN]}, "feed_forward_length must be .* not \\["),
        ({"llama.attention.head_count_kv": 3}, "n_kv_heads"),
        ({"llama.attention.head_count": 3}, "n_heads"),
        ({"llama.vocab_size": VOCAB + 1}, "vocab_size"),
        ({"llama.expert_count": 8}, "expert_count is 8"),
        ({"llama.rope.scaling.type": "yarn"}, "scaling.type is 'yarn'"),
        ({"llama.rope.dimension_count": 32}, "dimension_count is 32"),
        ({"split.count": 2}, "merge them"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unsupported_keys(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", keys=keys)
    for read in (read_params, read_tensors):
        with pytest.raises(ValueError, match=message):
            read(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without("token_embd.weight"), "no tensor 'token_embd.weight'"),
        (without("blk.1.ffn_up.weight"), "no tensor 'blk.1.ffn_up.weight'"),
        (without("output_norm.weight"), "no tensor 'output_norm.weight'"),
        (weights() | {"blk.0.attn_q.bias": np.zeros(DIM, np.float32)}, "'blk.0.attn_q.bias'"),
        (weights() | {"blk.2.attn_norm.weight": np.ones(DIM, np.float32)}, "'blk.2.attn_norm"),
        (weights() | {"blk.0.attn_k.weight": np.zeros((64, DIM), np.float32)}, r"\(64, 256\)"),
        (weights() | {"output.weight": np.zeros((VOCAB - 1, DIM), np.float32)}, r"\(499, 256\)"),
    ],
    ids=["no embedding", "no w3", "no norm", "bias", "layer 2", "wk shape", "output shape"],
)
def test_unsupported_tensors(tensors: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tensors)
    with pytest.raises(ValueError, match=message):
        read_tensors(path)  # before the first tensor is read


def test_unsupported_tensor_type(tmp_path: Path) -> None:
    integers = weights()["token_embd.weight"].astype(np.int8)
    raw = {"token_embd.weight": (integers, Q.I8)}
    path = write_gguf(tmp_path / "m.gguf", without("token_embd.weight"), raw=raw)
    with pytest.raises(ValueError, match=r"token_embd.weight: cannot read type I8"):
        read_tensors(path)


READERS: list[Callable[[Path], Any]] = [read_params, read_tensors, read_tokenizer]


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_files_that_are_not_gguf(read: Callable[[Path], Any], plain: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"give the path of a \.gguf"):
        read(tmp_path / "absent.gguf")
    with pytest.raises(FileNotFoundError):
        read(tmp_path)  # a folder
    bad, whole = tmp_path / "bad.gguf", plain.read_bytes()
    for content in (b"", b"GG", b"version https://git-lfs\n" * 10):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.gguf is not a GGUF file"):
            read(bad)
    for size in [*range(4, 1000, 47), *range(1000, 20000, 1999), len(whole) // 2, len(whole) - DIM]:
        bad.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"bad.gguf is a partial download"):
            read(bad)


def test_other_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="byte order"):
        read_params(path)


def test_without_the_gguf_package(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install -e '.*\[demo\]'"):
        read_params(plain)


def test_key_that_is_not_text(plain: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(plain.read_bytes().replace(b"smollm", b"smol\xff\xff"))
    with pytest.raises(ValueError, match=r"bad.gguf is damaged in tokenizer.ggml.pre"):
        read_tokenizer(bad)
