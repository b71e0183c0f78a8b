"""Two ranks propose the same ids, and generate those of one rank without speculation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import speculation_cases
from tests.distributed.test_tensor_parallel import results, torchrun, write

pytestmark = pytest.mark.slow


def test_two_ranks_generate_the_ids_of_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", n_kv_heads=2, vocab_size=261)
    plain = speculation_cases.answers(folder, speculate=False)
    fast = speculation_cases.answers(folder)
    assert fast["ids"] == plain["ids"] and not plain["proposed"] and not plain["refused"]
    ranks = results(torchrun(2, speculation_cases.__file__, folder))
    for rank in ranks:
        assert rank["ids"] == plain["ids"]
        assert rank["proposed"] == fast["proposed"] > rank["accepted"] == fast["accepted"] > 0
        assert "a draft runs on one rank" in rank["refused"]
