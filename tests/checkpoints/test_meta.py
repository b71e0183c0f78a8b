"""formats/meta.py: any number of shards on any number of ranks, against the split written out."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import ModelArgs, Transformer
from llama.checkpoints.formats.meta import MetaSource
from llama.checkpoints.load import load_model, read_part
from llama.checkpoints.open import open_checkpoint
from llama.distributed import tensor_parallel
from tests.models import random_weights

COUNTS = (1, 2, 4, 8, 16)
PARAMS: dict[str, Any] = {
    "dim": 64, "n_layers": 2, "n_heads": 16, "n_kv_heads": 8, "vocab_size": 96, "multiple_of": 16,
    "max_seq_len": 32,
}  # fmt: skip
D = 4  # head_dim
SPLIT = {
    "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "tok_embeddings": 0, "wo": 1, "w2": 1
}  # fmt: skip


def expected_part(name: str, w: Tensor, rank: int, size: int) -> Tensor:
    """The part of rank `rank` of `size`, head by head: the oracle."""
    kind = name.split(".")[-2]
    if kind in ("wk", "wv") and size > 8:
        head = rank // (size // 8)
        return w[head * D : (head + 1) * D]
    return w.chunk(size, SPLIT[kind])[rank] if kind in SPLIT else w


def whole_weights(tied: bool) -> dict[str, Tensor]:
    weights = random_weights(**PARAMS)
    if tied:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    return weights


def write(folder: Path, weights: dict[str, Tensor], n: int, **params: Any) -> Path:
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS | params))
    for rank in range(n):
        shard = {name: expected_part(name, w, rank, n).clone() for name, w in weights.items()}
        torch.save(shard, folder / f"consolidated.{rank:02}.pth")
    return folder


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n", COUNTS)
def test_parts_of_any_number_of_ranks(tmp_path: Path, n: int, tied: bool) -> None:
    """n = 16 is the layout of the 405B release: 8 KV heads, each stored twice."""
    weights = whole_weights(tied)
    source = open_checkpoint(write(tmp_path / "c", weights, n))
    assert source.tied == tied and source.n_shards == n
    args = source.args()
    for m in COUNTS:
        for rank in range(m):
            for name, w in weights.items():
                got = read_part(source, name, args, rank, m)
                assert torch.equal(got, expected_part(name, w, rank, m)), (name, m, rank)


@pytest.mark.parametrize("counted", [8, 16])
def test_duplicated_kv_heads_are_merged(tmp_path: Path, counted: int) -> None:
    """8 heads are stored twice each; params.json says 8 or 16."""
    weights = whole_weights(False)
    source = MetaSource(write(tmp_path / "c", weights, 16, n_kv_heads=counted))
    assert source.params["n_kv_heads"] == 8 and source.kv_copies == 2
    for name, w in weights.items():
        assert torch.equal(source.read(name), w), name


def test_sixteen_different_heads_are_not_merged(tmp_path: Path) -> None:
    weights = random_weights(**PARAMS | {"n_kv_heads": 16})
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS | {"n_kv_heads": 16}))
    for rank in range(16):
        shard = {
            name: (
                w.chunk(16, SPLIT[k])[rank] if (k := name.split(".")[-2]) in SPLIT else w
            ).clone()
            for name, w in weights.items()
        }
        torch.save(shard, folder / f"consolidated.{rank:02}.pth")
    assert MetaSource(folder).params["n_kv_heads"] == 16


@pytest.mark.parametrize("counted", [4, 2, 1])
def test_heads_are_never_dropped(tmp_path: Path, counted: int) -> None:
    """More different heads than params.json says: an error."""
    source = MetaSource(write(tmp_path / "c", whole_weights(False), 1, n_kv_heads=counted))
    with pytest.raises(ValueError, match="wrong shape"):
        source.args()


def test_merging_compares_every_head(tmp_path: Path) -> None:
    folder = write(tmp_path / "c", whole_weights(False), 16, n_kv_heads=16)
    path = folder / "consolidated.15.pth"
    shard = torch.load(path, weights_only=True)
    shard["layers.1.attention.wv.weight"] += 1
    torch.save(shard, path)
    assert MetaSource(folder).params["n_kv_heads"] == 16


def logits(model: Transformer, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(tokens)
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n", COUNTS)
def test_logits_of_merged_shards_are_bit_identical(tmp_path: Path, n: int, tied: bool) -> None:
    weights, tokens = whole_weights(tied), torch.randint(0, 96, (2, 20))
    original = Transformer(ModelArgs(**PARAMS))
    original.load_state_dict(weights)
    source = open_checkpoint(write(tmp_path / "c", weights, n))
    args = source.args(max_seq_len=32)
    model = load_model(source, args, torch.device("cpu"), torch.float32)
    assert torch.equal(logits(model, tokens), logits(original, tokens))
    shared = model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()
    assert shared == tied


class Ranks:
    """M ranks as threads of this process, with collectives that meet at a barrier."""

    def __init__(self, size: int):
        self.local, self.barrier = threading.local(), threading.Barrier(size)
        self.size, self.slots = size, [torch.empty(0)] * size

    def exchange(self, x: Tensor) -> list[Tensor]:
        self.slots[self.local.rank] = x
        self.barrier.wait()
        every = list(self.slots)
        self.barrier.wait()
        return every

    def run(self, job: Any) -> list[Tensor]:
        results: list[Any] = [None] * self.size

        def work(rank: int) -> None:
            self.local.rank = rank
            try:
                results[rank] = job()
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=work, args=(r,)) for r in range(self.size)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return results


@pytest.mark.parametrize("n", [1, 2, 8, 16])
@pytest.mark.parametrize("m", [2, 4, 8, 16])
def test_logits_on_any_number_of_ranks(
    tmp_path: Path, n: int, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only close: partial sums of ranks are added in another order than in one matmul.

    fp64 keeps the difference small; norms and logits are in fp32 for any dtype.
    """
    weights, tokens = whole_weights(False), torch.randint(0, 96, (2, 20))
    original = Transformer(ModelArgs(**PARAMS)).double()
    original.load_state_dict(weights)
    want = logits(original, tokens)
    source, ranks = open_checkpoint(write(tmp_path / "c", weights, n)), Ranks(m)
    for name, collective in {
        "size": lambda: m,
        "rank": lambda: ranks.local.rank,
        "reduce_from_ranks": lambda x: torch.stack(ranks.exchange(x)).sum(0),
        "gather_from_ranks": lambda x: torch.cat(ranks.exchange(x), -1),
        "copy_to_ranks": lambda x: x,
    }.items():
        monkeypatch.setattr(tensor_parallel, name, collective)
        monkeypatch.setattr(f"llama.model.{name}", collective, raising=False)

    # Meta-device contexts are per thread; models are made before the threads meet.
    def job() -> Tensor:
        args = source.args(max_seq_len=32)
        return logits(load_model(source, args, torch.device("cpu"), torch.float64), tokens)

    for got in ranks.run(job):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_norms_of_different_shards(tmp_path: Path) -> None:
    """With one rank per shard each rank gets its shard's norm, otherwise the first shard's."""
    folder = write(tmp_path / "c", whole_weights(False), 2)
    path = folder / "consolidated.01.pth"
    shard = torch.load(path, weights_only=True)
    shard["norm.weight"] += 1
    torch.save(shard, path)
    source = open_checkpoint(folder)
    first = source.read("norm.weight")
    assert torch.equal(read_part(source, "norm.weight", source.args(), 1, 2), first + 1)
    for size in (1, 4):
        assert torch.equal(read_part(source, "norm.weight", source.args(), 0, size), first)


def test_rows_of_one_shard_are_not_copied(tmp_path: Path) -> None:
    """They are views of the mapped file."""
    source = MetaSource(write(tmp_path / "c", whole_weights(False), 2))
    name = "layers.0.feed_forward.w1.weight"
    view = source.read(name, 0, 0, 10)
    assert view.untyped_storage().data_ptr() == source.shards[0][name].untyped_storage().data_ptr()


def test_impossible_number_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(write(tmp_path / "c", whole_weights(False), 1))
    monkeypatch.setattr(tensor_parallel, "size", lambda: 3)
    with pytest.raises(ValueError, match=r"3 ranks .*use one of \[1, 2, 4, 8, 16\] ranks"):
        load_model(source, source.args(), torch.device("cpu"), torch.float32)
