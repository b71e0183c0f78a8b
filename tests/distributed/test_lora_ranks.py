"""An adapter of a whole build on 2 gloo ranks gives the logits of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.distributed import lora_cases
from tests.distributed.test_tensor_parallel import results, torchrun, write


def test_two_ranks_have_the_logits_of_one(tmp_path: Path) -> None:
    """Plain, int8 and int4 bases, with and without DoRA, whose norms need all ranks' columns."""
    shape: dict[str, Any] = {
        "dim": 512,
        "n_heads": 4,
        "n_kv_heads": 2,
        "multiple_of": 512,
        "vocab_size": 31,
    }
    folder = write(tmp_path / "base", **shape)
    wanted = torch.tensor(lora_cases.all_logits(folder))
    assert len({tuple(row.tolist()) for row in wanted}) == len(lora_cases.CASES)
    ranks = results(torchrun(2, lora_cases.__file__, folder))
    assert len(ranks) == 2
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank["logits"]), wanted, atol=1e-4, rtol=1e-4)
