"""Adapters per request on several gloo ranks: the answers of one rank, and of merged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llama.checkpoints.open import open_checkpoint
from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.engine.sampling import Sampling
from tests.adapters import merged_model
from tests.distributed import rank_cases
from tests.distributed.test_tensor_parallel import SCRIPT, assert_equal, results, torchrun, write

pytestmark = pytest.mark.filterwarnings("ignore:.*no tokenizer")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One has fewer KV heads than ranks."""
    at = tmp_path_factory.mktemp("adapters")
    return [
        write(at / "wide", n_kv_heads=4, vocab_size=61),
        write(at / "one-kv-head", n_kv_heads=1, vocab_size=60),
    ]


@pytest.fixture(scope="module")
def one_rank(folders: list[str]) -> list[dict[str, Any]]:
    return [rank_cases.generate_adapted(f, s) for f in folders for s in (None, "int8")]


def test_one_rank_answers_as_merged_weights(
    folders: list[str], one_rank: list[dict[str, Any]]
) -> None:
    for folder, got in zip(folders, one_rank[::2], strict=True):
        args = open_checkpoint(folder).args(max_seq_len=48, max_batch_size=3)
        weights = torch.load(Path(folder, "consolidated.00.pth"))
        adapters: dict[Any, Any] = {None: None, **rank_cases.adapters_for(args)}
        for i, (name, adapter) in enumerate([*adapters.items()] * 2):
            engine = Engine(merged_model(args, weights, adapter))
            [want] = engine.run([Request(([*rank_cases.PROMPTS] * 2)[i], 9, Sampling(0.0))])
            assert got["adapted"][i] == want.tokens, name


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_answer_as_one(folders: list[str], one_rank: list[dict[str, Any]], n: int) -> None:
    ranks = results(torchrun(n, str(SCRIPT), "adapted", *folders))
    assert len(ranks) == n
    for result in ranks:
        for got, expected in zip(result["generated"], one_rank, strict=True):
            assert_equal(got, expected)
