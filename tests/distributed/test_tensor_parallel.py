"""tensor_parallel.py: any number of gloo ranks under torchrun generates the ids of one rank."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import Llama, ModelArgs, Transformer
from llama.checkpoints import load
from llama.checkpoints.footprint import Footprint
from llama.checkpoints.open import open_checkpoint
from llama.distributed import agreement, tensor_parallel
from llama.distributed.sharding import rank_counts, rank_part, weight_shapes
from llama.layers import kernels
from tests.distributed import rank_cases
from tests.models import random_weights

SCRIPT = Path(rank_cases.__file__)
# The dimension along which a weight is split; norms are replicated.
SPLIT = {
    "wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "tok_embeddings": 0, "wo": 1, "w2": 1
}  # fmt: skip
SMALL: dict[str, Any] = {"dim": 32, "n_layers": 2, "n_heads": 4, "multiple_of": 16}
LLAMA_8B: dict[str, Any] = {
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256,
    "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "rope_theta": 500000.0,
}  # fmt: skip


def torchrun(n: int, *command: str) -> str:
    """Run a job to its end; return its stdout. Fails with its stderr."""
    job = start_torchrun(n, *command)
    out, err = job.communicate(timeout=240)
    assert job.returncode == 0, err[:6000]
    return out


def start_torchrun(
    n: int, *command: str, launcher: Sequence[str] = ("--standalone",), **env: str
) -> subprocess.Popen[str]:
    """Start `python COMMAND` on `n` ranks; `launcher` are torchrun's flags."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", *launcher, f"--nproc_per_node={n}"]
    root = SCRIPT.parents[2]  # scripts of ranks import helpers of the tests
    return subprocess.Popen(
        [*torchrun, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)} | env,
    )


def results(out: str) -> list[dict[str, Any]]:
    """The result that each rank printed, in the order of ranks. Any other line is an error."""
    lines = sorted((json.loads(line) for line in out.splitlines()), key=lambda r: r["rank"])
    assert [r.pop("rank") for r in lines] == list(range(len(lines)))
    return lines


def write(folder: Path, shards: int = 1, seed: int = 0, tied: bool = False, **params: Any) -> str:
    """A checkpoint of random weights; with vocab_size 261 also a ChatML tokenizer of bytes."""
    folder.mkdir()
    params = SMALL | params
    (folder / "params.json").write_text(json.dumps(params))
    weights = random_weights(seed, **params)
    if tied:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    for rank in range(shards):
        state: dict[str, Tensor] = {}
        for name, w in weights.items():
            dim = SPLIT.get(name.split(".")[-2])
            state[name] = w if dim is None or shards == 1 else w.chunk(shards, dim)[rank].clone()
        torch.save(state, folder / f"consolidated.{rank:02}.pth")
    if params["vocab_size"] == 261:
        lines = [base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)]
        (folder / "tokenizer.model").write_bytes(b"".join(lines))
        special = {"<s>": 256, "</s>": 257, "<|im_start|>": 258, "<|im_end|>": 259, "<x>": 260}
        sidecar: dict[str, Any] = {
            "pat_str": r"[\s\S]",
            "special_tokens": special,
            "bos_token": "<s>",
        }
        sidecar |= {"eos_token": "</s>", "pad_token": None, "stop_tokens": []}
        sidecar |= {"chat_format": "chatml", "default_system": None}
        (folder / "tokenizer.model.json").write_text(json.dumps(sidecar))
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Odd vocabularies, fewer KV heads than ranks, more shards than one; for 2 and 4 ranks."""
    at = tmp_path_factory.mktemp("ranks")
    write(at / "other", seed=1, n_kv_heads=4, vocab_size=261)
    write(at / "three", dim=48, n_heads=3, multiple_of=48, vocab_size=261)
    return [
        write(at / "odd", n_kv_heads=4, vocab_size=261),
        write(at / "one-kv-head", n_kv_heads=1, vocab_size=61),
        write(at / "tied", n_heads=8, n_kv_heads=2, vocab_size=5, tied=True),  # no ids on rank 3
        write(at / "two-shards", shards=2, n_kv_heads=2, vocab_size=60),
    ]


def decoding_collectives(layers: int) -> dict[str, int]:
    """Of a step: 2 sums a layer and the embedding's, then the logits and the drawn ids."""
    if kernels.load():  # through memory that the ranks share
        return {"sum": 2 * layers + 1, "stack": 2}
    return {"all_reduce": 2 * layers + 1, "all_gather": 1, "broadcast": 1}


def assert_equal(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Ids must be equal, log-probabilities within 1e-4."""
    expected = json.loads(json.dumps(expected))
    assert set(got) == set(expected)
    for name, value in expected.items():
        if not name.endswith(" scores"):
            assert got[name] == value, name
            continue
        for a, b in zip(got[name], value, strict=True):
            assert a == pytest.approx(b, abs=1e-4), name


@pytest.fixture(scope="module")
def one_rank(folders: list[str]) -> list[dict[str, Any]]:
    return [rank_cases.generate(folder) for folder in folders]


STEERED = [
    [[*rank_cases.SHARED, *[3] * 6], "length", 19],
    [[*rank_cases.SHARED, 1, 2, 1, 2, 1, 2], "length", 19],
    [[*rank_cases.SHARED, 1, 2], "error", 19],
]


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_generate_the_ids_of_one(
    folders: list[str], one_rank: list[dict[str, Any]], n: int
) -> None:
    ranks = results(torchrun(n, str(SCRIPT), "cases", *folders))
    assert len(ranks) == n
    args = open_checkpoint(folders[0]).args()
    for result in ranks:
        for got, expected in zip(result["generated"], one_rank, strict=True):
            assert expected["steered"][1:] == STEERED
            assert_equal(got, expected)
        assert result["gradient"] == pytest.approx(rank_cases.gradient(folders[0]), abs=1e-4)
        assert result["collectives"] == decoding_collectives(layers=2)
        assert sum(result["collectives"].values()) == Footprint(args, False, n).collectives()
        assert result["errors"] == ranks[0]["errors"]
    nowhere, one_nowhere, length, weights, heads, prompt, asked, after = ranks[0]["errors"]
    assert nowhere == "FileNotFoundError: no checkpoint folder at /nowhere; check ckpt_dir"
    assert one_nowhere == f"RankError: rank 1: {nowhere}"
    assert length == "ValueError: the ranks differ in max_seq_len: 16 on rank 0, 17 on rank 1"
    assert "the ranks differ in the weights" in weights
    assert f"{n} ranks cannot split 3 heads" in heads and "use one of [1, 3] ranks" in heads
    assert prompt.startswith("ValueError: the ranks differ in the prompt: 3 tokens (")
    assert "rank 1: RuntimeError: rank 0 runs other requests" in asked and after == asked


@pytest.mark.slow
def test_replicas_are_independent(folders: list[str]) -> None:
    ranks = results(torchrun(4, str(SCRIPT), "replicas", folders[0]))
    llama = Llama.build(folders[0], None, 48, 2, device="cpu", dtype=torch.float32)
    for rank, result in enumerate(ranks):
        number = rank // 2
        expected = [llama.generate([[1, 2, number + i]], 6, 0.0)[0] for i in range(1 + 2 * number)]
        assert result == {"replica": number, "calls": expected}


def test_two_nodes(folders: list[str], one_rank: list[dict[str, Any]]) -> None:
    """Two torchrun agents on loopback, with the flags of docs/ranks.md."""
    launcher = ["--nnodes=2", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    command = [str(SCRIPT), "one", folders[3]]
    nodes = [
        start_torchrun(1, *command, launcher=[*launcher, f"--node_rank={i}"]) for i in range(2)
    ]
    outputs = [node.communicate(timeout=240) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], [err[-2000:] for _, err in outputs]
    for result in results("".join(out for out, _ in outputs)):
        assert_equal(result, one_rank[3])


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.slow
def test_demo_model_on_three_ranks(demo: Llama, demo_dir: Path) -> None:
    """Its nine heads can be split over three ranks, not over two."""
    assert rank_counts(demo.model.params) == [1, 3]
    expected = json.loads(json.dumps(rank_cases.generate_demo(demo)))
    assert results(torchrun(3, str(SCRIPT), "demo", str(demo_dir))) == [expected] * 3


def test_vocabulary_shares(folders: list[str]) -> None:
    """The rows of all ranks, concatenated, are the whole weight, then rows of zeros."""
    for folder in folders[1:3]:
        source = open_checkpoint(folder)
        args = source.args()
        for n in (2, 4):
            for name in ("tok_embeddings.weight", "output.weight"):
                rows = [load.read_part(source, name, args, r, n) for r in range(n)]
                assert len({part.shape for part in rows}) == 1
                joined, whole = torch.cat(rows), source.read(name)
                assert torch.equal(joined[: args.vocab_size], whole)
                assert len(joined) < args.vocab_size + n and not joined[args.vocab_size :].any()


@pytest.mark.parametrize("size", [2, 4, 8])
def test_memory_of_a_rank(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """8B: each rank has its share of the weights, and at most 3 % more."""
    args = ModelArgs(**LLAMA_8B)
    with torch.device("meta"):
        whole = sum(w.numel() for w in Transformer(args).state_dict().values())
        monkeypatch.setattr(tensor_parallel, "size", lambda: size)
        on_rank = {name: w.numel() for name, w in Transformer(args).state_dict().items()}
    assert whole == 8_030_261_248
    assert whole / size <= sum(on_rank.values()) <= 1.03 * whole / size
    for name, numel in on_rank.items():  # and no rank gets more than it has room for
        shape = weight_shapes(args)[name]
        for rank in range(size):
            part = rank_part(name, args, rank, size)
            rows = shape[0] if part is None else (part[2] - part[1]) * shape[1 - part[0]]
            assert rows <= numel


def test_identity_on_one_rank() -> None:
    x = torch.randn(3, 4)
    assert tensor_parallel.size() == 1 and tensor_parallel.rank() == 0
    for name in ("copy_to_ranks", "reduce_from_ranks", "gather_from_ranks"):
        assert getattr(tensor_parallel, name)(x) is x
    for collective in (tensor_parallel.broadcast_from_first, tensor_parallel.max_over_ranks):
        assert collective(x) is x
    assert tensor_parallel.broadcast_json({"a": 1}) == {"a": 1}
    with (
        pytest.raises(KeyError, match="own"),
        agreement.fails_on_all_ranks(),
        tensor_parallel.ends_job_on_error(),
    ):
        raise KeyError("own")
    assert tensor_parallel.size() == 1


def test_bad_sizes() -> None:
    for wrong in (2, 0, -1):
        with pytest.raises(ValueError, match="does not divide the 1 running"):
            tensor_parallel.initialize(wrong, torch.device("cpu"))
