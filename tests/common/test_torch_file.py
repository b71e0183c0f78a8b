"""common/torch_file.py: reads what torch.save writes; damage is an error before torch reads it."""

from __future__ import annotations

import codecs
import os
import pickle
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llama.common.torch_file import find_storages, load_torch
from tests.fuzz.bases import archive_of, records_of


def tied_slices() -> dict[str, torch.Tensor]:
    """Two names of one storage, and two parts of another."""
    whole, tied = torch.arange(12.0).view(3, 4), torch.ones(5)
    return {"a": tied, "b": tied, "rows": whole[1:], "columns": whole[:, 1:3]}


def attributed() -> nn.Parameter:
    """A parameter as fairscale marks it."""
    parameter = nn.Parameter(torch.ones(2))
    parameter.partition_dim = 0  # type: ignore[attr-defined]
    return parameter


SAVED: dict[str, Any] = {
    "dtypes": {
        str(dtype): torch.zeros(3, dtype=dtype)
        for dtype in (torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.uint16)
    },
    "float8": {"a": torch.zeros(3).to(torch.float8_e4m3fn)},
    "state dict": nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)).state_dict(),
    "parameters": OrderedDict(nn.Linear(2, 3).named_parameters()),
    "attributes": {"a": attributed()},
    "views": tied_slices(),
    "empty": {"a": torch.empty(0, 4), "scalar": torch.tensor(2.0)},
    "complex": {"a": torch.tensor([1j, 2]), "b": torch.ones(1, dtype=torch.complex128)},
    "keys": {(1, "a"): 1, 2.5: 2, None: 3, True: 4, b"a": 5, (): 6},
    "a training state": {"step": 2**40, "rate": 0.1, "on": True, "groups": [{"betas": (0.9, 1)}]},
}


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("name", SAVED)
def test_what_torch_saves_is_read(name: str, old: bool, mmap: bool, tmp_path: Path) -> None:
    if old and name in ("dtypes", "float8"):
        pytest.skip("torch cannot save it so")
    path = tmp_path / "a.pth"
    torch.save(SAVED[name], path, _use_new_zipfile_serialization=not old)
    found = load_torch(path, mmap)
    oracle = torch.load(path, weights_only=True)
    torch.testing.assert_close(found, oracle, rtol=0, atol=0)


BESIDE: dict[str, Any] = {
    "device": torch.device("cuda:0"),
    "set": {1, "a", None, (1, 2)},
    "empty set": set(),
    "complex": 2 + 1j,
    "bytes": b"\x00\xffab",
    "counter": Counter([3, 3, 5]),
    "empty counter": Counter(),
}


@pytest.mark.parametrize("old", [False, True], ids=["zip", "old"])
@pytest.mark.parametrize("name", BESIDE)
def test_values_beside_the_weights(name: str, old: bool, tmp_path: Path) -> None:
    state, path = {"model": {"a": torch.ones(2)}, name: BESIDE[name]}, tmp_path / "a.pth"
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    found = load_torch(path, mmap=True)
    assert found[name] == BESIDE[name] and type(found[name]) is type(BESIDE[name])
    assert found["model"]["a"].tolist() == [1, 1]


def test_files_without_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_torch(tmp_path / "a.pth")["a"].sum() == 3


def rewrite(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Write the records of a zip archive again, each changed by `change(name, content)`."""
    records = records_of(path.read_bytes())
    path.write_bytes(archive_of({name: change(name, content) for name, content in records.items()}))


@pytest.mark.parametrize("part", [0, 0.5, 0.99])
@pytest.mark.parametrize("record", range(4))
def test_a_record_shorter_than_its_tensor(record: int, part: float, tmp_path: Path) -> None:
    """torch takes the missing numbers from the next record."""
    path = tmp_path / "a.pth"
    torch.save({str(i): torch.full((100,), float(i)) for i in range(5)}, path)

    def shorten(name: str, content: bytes) -> bytes:
        return content[: int(len(content) * part)] if name == f"a/data/{record}" else content

    rewrite(path, shorten)
    try:
        wrong = torch.load(path, weights_only=True, mmap=True)[str(record)]
        assert not torch.equal(wrong, torch.full((100,), float(record)))
    except RuntimeError:
        pass  # torch versions that compare sizes
    with pytest.raises(ValueError, match=rf"a.pth is damaged \(its record data/{record} has .* of"):
        load_torch(path, mmap=True)


def test_old_files_are_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save(tied_slices(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a.pth is (damaged|not a torch checkpoint)"):
            load_torch(path, mmap=True)


class Call:
    """Pickled, a call of `function(*args)`."""

    def __init__(self, function: Callable[..., Any], *args: Any):
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def nested_key() -> tuple[Any, ...]:
    """Takes 2^40 steps to hash."""
    key: tuple[Any, ...] = ()
    for _ in range(40):
        key = (key, key)
    return key


MANY = list(range(300))
HOSTILE: dict[str, tuple[Any, str]] = {
    "code": (Call(os.system, "touch ran"), "could run code"),
    "memory": (Call(bytearray, 2**45), "could run code"),
    "a tensor by its size": (Call(torch.FloatTensor, 2**45), "could run code"),
    "codecs": (Call(codecs.encode, "a", "idna"), "its bytes are not latin1"),
    "a set of a nested tuple": (Call(set, [nested_key()]), "a set of something else"),
    "a counter of one": (Call(Counter, [nested_key()]), "a set of something else"),
    "sets of one list": ([Call(set, MANY)] * 2 + [Call(set, MANY)], "a set of something else"),
    "sparse": (torch.eye(2).to_sparse(), "has sparse tensors"),
    "meta": (torch.ones(2, device="meta"), "has empty"),
    "nested": (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "has nested tensors"),
    "expanded": (torch.ones(1).expand(2**40), r"a tensor of shape \(1099511627776,\) has 4 of"),
    "transposed and expanded": (torch.ones(1, 2).expand(2**20, 2).T, "a tensor of shape"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path, (value, message) = tmp_path / "a.pth", HOSTILE[name]
    torch.save({"a": value}, path)
    with pytest.raises(ValueError, match=f"a.pth .*{message}"):
        load_torch(path, mmap=True)
    assert not (tmp_path / "ran").exists()


def test_keys_that_cannot_be_hashed() -> None:
    data = pickle.dumps({}, 2)[:-1] + pickle.dumps(nested_key(), 2)[2:-1] + b"K\x01s."
    with pytest.raises(ValueError, match="a key of a dict"):
        find_storages(data)


def test_other_objects_beside_the_weights(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), "args": Namespace(lr=0.1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"save the state dict alone\. \(It .*argparse\.Namespace"):
        load_torch(tmp_path / "a.pth")


def test_files_that_would_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="is a folder, a pipe or a device"):
        load_torch(tmp_path / "a.pth")
