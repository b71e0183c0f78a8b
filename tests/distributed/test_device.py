"""device.py: the device and dtype that a rank gets, and errors for those it cannot have."""

from __future__ import annotations

import pytest
import torch

from llama.distributed import tensor_parallel
from llama.distributed.device import pick_device, pick_dtype

CPU = torch.device("cpu")


def test_device() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device(None).type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match="unknown device"):
        pick_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            pick_device("cuda")


def test_dtype() -> None:
    for name in (torch.float16, "float16", "fp16"):
        assert pick_dtype(name, CPU) == torch.float16
    for best in (None, "auto"):
        assert pick_dtype(best, CPU) in (torch.bfloat16, torch.float32)
    for wrong in (torch.int8, 16):
        with pytest.raises(TypeError, match="dtype"):
            pick_dtype(wrong, CPU)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        pick_dtype("int8", CPU)


def second_rank(monkeypatch: pytest.MonkeyPatch, local_rank: str) -> None:
    names = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": local_rank}
    for name, value in (names | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch is replaced by one that finds a single GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    second_rank(monkeypatch, "1")
    for device in (None, "cuda", "cuda:1"):
        with pytest.raises(ValueError, match=r"finds 1 GPU\(s\) here, and no cuda:1: start at"):
            pick_device(device)
    second_rank(monkeypatch, "one")
    with pytest.raises(ValueError, match="LOCAL_RANK=one in the environment must be a number"):
        pick_device("cuda")


def test_several_ranks_do_not_use_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither gloo nor nccl communicates on it. torch is replaced by one that finds mps."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device(None).type == "mps"
    second_rank(monkeypatch, "1")
    assert pick_device(None) == CPU
    with pytest.raises(ValueError, match="several ranks cannot share a model on mps"):
        tensor_parallel.initialize(None, torch.device("mps"))
