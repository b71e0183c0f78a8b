"""parallel.py: two gloo ranks under torchrun give one rank's ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import parallel

Tiny = Callable[..., Path]
SCRIPT = Path(__file__).with_name("two_ranks.py")
# Split on dim 0 or 1; norms are replicated.
SPLIT = {
    "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "tok_embeddings": 0, "wo": 1, "w2": 1
}  # fmt: skip


def torchrun(n: int, *command: str) -> str:
    """The job's stdout; its stderr when it fails."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, f"--nproc_per_node={n}", *command],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=SCRIPT.parent.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def split(folder: Path) -> None:
    """Replace the one shard by two."""
    path = folder / "consolidated.00.pth"
    whole = torch.load(path, weights_only=True)
    for rank in range(2):
        shard = {}
        for name, w in whole.items():
            dim = SPLIT.get(name.split(".")[-2])
            shard[name] = w if dim is None else w.chunk(2, dim)[rank].clone()
        torch.save(shard, folder / f"consolidated.{rank:02}.pth")


def test_two_ranks_give_one_ranks_ids(tiny_checkpoint: Tiny, llama3_tokenizer_path: Path) -> None:
    folder = tiny_checkpoint()
    arguments = [str(SCRIPT), str(folder), str(llama3_tokenizer_path)]
    one = json.loads(torchrun(1, *arguments))
    split(folder)
    two: list[dict[str, Any]] = [json.loads(x) for x in torchrun(2, *arguments).splitlines()]
    assert sorted(r["rank"] for r in two) == [0, 1]  # nobody's stdout is thrown away
    for result in two:
        assert result["greedy"] == one["greedy"]
        assert result["sampled"] == one["sampled"]
        for got, want in zip(result["scores"], one["scores"], strict=True):
            assert got[0] is None and got[1:] == pytest.approx(want[1:], abs=1e-4)


def test_identity_on_one_rank() -> None:
    x = torch.randn(3, 4)
    assert parallel.size() == 1 and parallel.rank() == 0
    for collective in (parallel.copy, parallel.reduce, parallel.gather, parallel.broadcast):
        assert collective(x) is x


def test_sizes_that_do_not_fit() -> None:
    for wrong in (2, 0, -1):
        with pytest.raises(ValueError, match="does not divide the 1 running"):
            parallel.initialize(wrong, torch.device("cpu"))
