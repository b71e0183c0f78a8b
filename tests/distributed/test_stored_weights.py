"""Checkpoints as others write them, on two gloo ranks: the ids of one rank and plain files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed import rank_cases
from tests.distributed.test_tensor_parallel import SCRIPT, assert_equal, results, torchrun, write


@pytest.mark.parametrize("shards", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_parameters_and_padded_rows(shards: int, tmp_path: Path) -> None:
    """`.pth` of nn.Parameters, whose embedding has 11 rows more than there are tokens."""
    sizes: dict[str, Any] = {"n_kv_heads": 2, "vocab_size": 272}
    plain = Path(write(tmp_path / "plain", shards=shards, **sizes))
    folder = Path(write(tmp_path / "c", shards=shards, **sizes))
    write(tmp_path / "tokenizer", vocab_size=261)
    for path in (*folder.glob("*.pth"), *plain.glob("*.pth")):
        state = torch.load(path, weights_only=True)
        if path.parent == folder:
            state = {"model": {name: nn.Parameter(w) for name, w in state.items()}}
        torch.save(state, path)
    for name in ("tokenizer.model", "tokenizer.model.json"):
        for path in (folder, plain):
            (path / name).write_bytes((tmp_path / "tokenizer" / name).read_bytes())
    assert json.loads((folder / "params.json").read_text())["vocab_size"] == 272
    expected = rank_cases.stored(str(plain))
    assert max(map(max, expected["drawn"])) <= 260
    for result in results(torchrun(2, str(SCRIPT), "stored", str(folder))):
        assert_equal(result, expected)
