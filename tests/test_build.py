"""Llama.build: refused arguments, dtypes, and what it leaves unchanged in the process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.checkpoints.download import hub_name


@pytest.mark.parametrize("native", [True, False])
def test_names_of_a_dtype(
    folder: Path, byte_tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)

    def build(dtype: Any) -> Llama:
        return Llama.build(folder, byte_tokenizer_path, 64, 1, device="cpu", dtype=dtype)

    expected = build(torch.bfloat16).model.state_dict()
    for dtype in ("bf16", "bfloat16"):
        found = build(dtype).model.state_dict()
        assert all(
            w.dtype == torch.bfloat16 and torch.equal(w, expected[n]) for n, w in found.items()
        )
    best = torch.bfloat16 if native else torch.float32
    for automatic in ("auto", None):
        assert build(automatic).model.norm.weight.dtype == best


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"max_seq_len": 0}, ValueError),
        ({"max_batch_size": -1}, ValueError),
        ({"max_batch_size": 1.5}, ValueError),
        ({"seed": "x"}, TypeError),
        ({"seed": None}, TypeError),
        ({"model_parallel_size": 2}, ValueError),
        ({"model_parallel_size": 0}, ValueError),
        ({"dtype": "fp17"}, ValueError),
        ({"dtype": 16}, TypeError),
        ({"dtype": torch.float8_e4m3fn}, TypeError),
        ({"device": "gpu0"}, ValueError),
        ({"device": "meta"}, ValueError),
        ({"seed": 2**70}, TypeError),
        ({"model_parallel_size": "1"}, TypeError),
    ],
)
def test_bad_build(
    folder: Path,
    byte_tokenizer_path: Path,
    change: dict[str, Any],
    error: type[Exception],
) -> None:
    arguments: dict[str, Any] = {
        "ckpt_dir": folder,
        "tokenizer_path": byte_tokenizer_path,
        "max_seq_len": 16,
        "max_batch_size": 1,
        "device": "cpu",
    }
    with pytest.raises(error):
        Llama.build(**arguments | change)


def test_build_changes_nothing_in_the_process_and_can_be_repeated(
    tiny_checkpoint: Callable[..., Path], llama3_tokenizer_path: Path
) -> None:
    """Items 1, 8 and 15 of docs/parity.md: no launcher, no process group, any number of builds."""
    before = torch.get_default_dtype(), torch.get_default_device(), sys.stdout
    for seed in (1, 2):
        folder = tiny_checkpoint(use_scaled_rope=seed == 2, rope_scale_factor=16)
        llama = Llama.build(folder, llama3_tokenizer_path, 9000, 1, seed=seed, dtype=torch.float32)
        assert torch.initial_seed() == seed
        # Item 4: 3.1's params.json and stop tokens, and more than 8192 positions.
        assert (128008 in llama.tokenizer.stop_tokens) == (seed == 2)
        llama.generate([[1, 2, 3]], 2)
    assert before == (torch.get_default_dtype(), torch.get_default_device(), sys.stdout)
    assert not torch.distributed.is_initialized()


def test_a_path_is_enough(demo_dir: Path) -> None:
    llama = Llama.build(demo_dir)
    args = llama.model.params
    assert (args.max_seq_len, args.max_batch_size) == (4096, 1)
    assert llama.tokenizer.n_words == args.vocab_size


@pytest.mark.parametrize(
    "text",
    [
        "meta-llama/Llama-3.2-1B",
        "https://huggingface.co/meta-llama/Llama-3.2-1B",
        "https://huggingface.co/meta-llama/Llama-3.2-1B/tree/main",
        "http://www.huggingface.co/meta-llama/Llama-3.2-1B?library=x",
        "huggingface.co/meta-llama/Llama-3.2-1B.git",
        "https://hf.co/meta-llama/Llama-3.2-1B#files",
        "hf://meta-llama/Llama-3.2-1B@main",
    ],
)
def test_names_and_addresses_of_the_hub_say_how_to_download(text: str) -> None:
    assert hub_name(text) == "meta-llama/Llama-3.2-1B"
    for path in (text, Path(text)):
        with pytest.raises(FileNotFoundError, match=r"`llama3 download meta-llama/Llama-3\.2-1B`"):
            Llama.build(path)


@pytest.mark.parametrize("text", ["model", "./a/b", "/a/b", "a/b/c", "https://x.org/a/b", "../b"])
def test_paths_are_not_names_of_the_hub(text: str) -> None:
    assert hub_name(text) is None


def test_a_folder_that_looks_like_a_name_is_opened(
    folder: Path, byte_tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent.parent)
    name = f"{folder.parent.name}/{folder.name}"
    assert hub_name(name) == name
    Llama.build(name, byte_tokenizer_path, 16, 1, device="cpu")
