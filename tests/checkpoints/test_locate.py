"""Paths that users give: what they mean, or a message that names the right one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama.checkpoints.convert import convert
from llama.checkpoints.open import open_checkpoint
from llama.checkpoints.verify import verify
from tests.checkpoints.gguf_files import KEYS, vocabulary_keys, weights, write_gguf
from tests.checkpoints.test_meta import PARAMS, whole_weights, write

COMMIT = "0123456789abcdef"


def write_split(folder: Path, n: int, suffix: str = ".gguf") -> list[Path]:
    """A model in `n` files, as llama.cpp's gguf-split writes them: metadata in the first."""
    folder.mkdir(exist_ok=True)
    tensors = weights()
    names = sorted(tensors)
    paths = [folder / f"m-{i + 1:05}-of-{n:05}{suffix}" for i in range(n)]
    for i, path in enumerate(paths):
        split: dict[str, Any] = {"split.no": i, "split.count": n, "split.tensors.count": len(names)}
        keys = vocabulary_keys("llama-bpe") | split if i == 0 else dict.fromkeys(KEYS) | split
        part = {name: tensors[name] for name in names[i::n]}
        write_gguf(path, part, keys | {"general.architecture": "llama"})
    return paths


def test_split_gguf(tmp_path: Path) -> None:
    whole = open_checkpoint(write_gguf(tmp_path / "whole.gguf", keys=vocabulary_keys("llama-bpe")))
    paths = write_split(tmp_path / "split", 3)
    for path in (*paths, tmp_path / "split"):
        source = open_checkpoint(path)
        assert source.shapes() == whole.shapes() and source.params == whole.params
        for name in whole.shapes():
            assert np.array_equal(source.read(name), whole.read(name)), name
        assert source.vocabulary() == whole.vocabulary()
        assert verify(path, open_checkpoint) == []


def test_split_gguf_with_a_wrong_part(tmp_path: Path) -> None:
    first, second, third = write_split(tmp_path / "split", 3)
    content = third.read_bytes()
    third.unlink()
    for path in (first, second, tmp_path / "split"):
        with pytest.raises(FileNotFoundError, match=f"lacks parts .*: {third.name}; download"):
            open_checkpoint(path)
        [problem] = verify(path, open_checkpoint)
        assert problem == f"{third} is missing; download it"
    third.write_bytes(second.read_bytes())
    with pytest.raises(
        ValueError, match="is part 1 of 3, counted from 0, and its name says part 2"
    ):
        open_checkpoint(first)
    third.write_bytes(content)
    alone = Path(shutil.copy(first, tmp_path / "renamed.gguf"))
    with pytest.raises(ValueError, match=r"part 0 of 3.*give the parts their names"):
        open_checkpoint(alone)


@pytest.mark.parametrize("name", ["M.GGUF", "Model-Q4.Gguf", "m-00001-of-00001.gguf"])
def test_gguf_in_a_folder(name: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / name, keys=vocabulary_keys("llama-bpe"))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # as repositories have it
    (tmp_path / "mmproj-f16.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / name):
        assert open_checkpoint(path).layout == "gguf"
    (tmp_path / "mmproj-f16.gguf").unlink()
    assert verify(tmp_path, open_checkpoint) == []


def test_several_ggufs_in_a_folder(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.GGUF"):
        write_gguf(tmp_path / name, keys=vocabulary_keys("llama-bpe"))
    write_split(tmp_path, 2)
    message = r"contains 3 GGUF files; give the path of one of them: a.gguf, b.GGUF, m-00001-of"
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)
    assert any("contains 3 GGUF files" in problem for problem in verify(tmp_path, open_checkpoint))


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    folder = write(tmp_path / "meta", whole_weights(tied=False), 1)
    sidecar: dict[str, Any] = {"special_tokens": {"<e>": 1}, "bos_token": None, "eos_token": "<e>"}
    sidecar |= {"pad_token": None, "stop_tokens": []}
    (folder / "params.json").write_text(json.dumps(PARAMS | {"vocab_size": 96}))
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\n")
    (folder / "tokenizer.model.json").write_text(json.dumps(sidecar))
    return folder


def test_weights_in_original(meta: Path, tmp_path: Path) -> None:
    """A repository from which only original/ was downloaded."""
    repository = tmp_path / "repository"
    shutil.copytree(meta, repository / "original")
    assert open_checkpoint(repository).path == repository / "original"
    for name in ("config.json", "tokenizer_config.json", "model.safetensors.index.json"):
        (repository / name).write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
        assert open_checkpoint(repository).path == repository / "original"
        assert verify(repository, open_checkpoint) == []


@pytest.mark.parametrize("ref", [True, False])
def test_repository_of_the_hub_cache(ref: bool, meta: Path, tmp_path: Path) -> None:
    """models--OWNER--NAME: snapshots of links to blobs, named by refs/main."""
    repository = tmp_path / "hub" / "models--meta-llama--x"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(meta.iterdir())):
        shutil.copy(file, repository / "blobs" / str(i))
        os.symlink(f"../../blobs/{i}", snapshot / file.name)
    if ref:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT + "\n")
        (repository / "snapshots" / "older").mkdir()
    assert open_checkpoint(repository).path == snapshot
    assert verify(repository, open_checkpoint) == []
    with pytest.raises(ValueError, match=r"no checkpoint, but contains.*models--meta-llama--x"):
        open_checkpoint(tmp_path / "hub")
    if not ref:
        (repository / "snapshots" / "other").mkdir()
        with pytest.raises(ValueError, match=f"2 versions .*give the path of one: {COMMIT}, other"):
            open_checkpoint(repository)
        shutil.rmtree(repository / "snapshots")
        (repository / "snapshots").mkdir()
        with pytest.raises(ValueError, match=r"0 versions .*download the model again"):
            open_checkpoint(repository)


def test_home_folder(meta: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(meta.parent))
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("~/meta").path == meta
    assert convert("~/meta", "~/out", mp=1) == meta.parent / "out"
    assert verify("~/meta", open_checkpoint) == []
    shutil.copytree(meta, "~")  # a folder of that name
    assert open_checkpoint("~").path == Path("~")
    with pytest.raises(FileNotFoundError, match="no checkpoint folder at ~nobody-x/y"):
        open_checkpoint("~nobody-x/y")


def test_file_in_a_checkpoint(meta: Path) -> None:
    with pytest.raises(ValueError, match=f"give the folder .*perhaps {meta}"):
        open_checkpoint(meta / "consolidated.00.pth")
