"""The benchmarks run and report. How fast anything is, is not tested."""

from __future__ import annotations

import io
import json
import multiprocessing
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs_init

from benchmarks import generation, kernels, llama_cpp_peer, ranks, start, train
from benchmarks import load as load_benchmark
from benchmarks.random_checkpoint import SHAPES, RandomSource, write_rank_file
from benchmarks.workers import Reader, Worker
from llama.checkpoints.formats.gguf import GGUFSource
from llama.checkpoints.formats.meta_export import write_meta

TINY: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
TINY |= {"vocab_size": 400, "multiple_of": 32, "use_scaled_rope": True}


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    yield
    assert not multiprocessing.active_children()


Figures = dict[str, dict[str, dict[str, Any]]]  # of each row, of each column


def figures(capsys: pytest.CaptureFixture[str]) -> Figures:
    """The figures of the result in the last line of stdout."""
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows: Figures = {}
    for figure in result["figures"]:
        rows.setdefault(figure["row"], {})[figure["column"]] = figure
    return rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gguf_contains_the_weights(tmp_path: Path, dtype: str) -> None:
    source = RandomSource(TINY)
    llama_cpp_peer.write_gguf(source, tmp_path / "a.gguf", dtype)
    written = GGUFSource(tmp_path / "a.gguf")
    theirs, ours = written.args(), source.args()
    for name in ("dim", "n_layers", "n_heads", "kv_heads", "hidden_dim", "rope_theta", "norm_eps"):
        assert getattr(theirs, name) == getattr(ours, name)
    assert theirs.use_scaled_rope and theirs.scale_factor == ours.scale_factor
    for name in source.shapes():
        assert torch.equal(written.read(name), source.read(name).float())
    # A decode step reads everything but the embedding, and the 8 divisors of RoPE.
    matrices = sum(torch.Size(s).numel() for s in source.shapes().values() if len(s) == 2)
    norms = sum(s[0] for s in source.shapes().values() if len(s) == 1)
    matrices -= TINY["vocab_size"] * TINY["dim"]
    size = getattr(torch, dtype).itemsize * matrices + 4 * (norms + 8)
    assert llama_cpp_peer.weight_bytes(tmp_path / "a.gguf") == size


def test_failing_worker() -> None:
    with Worker("the reading", Reader, -4) as worker:
        with pytest.raises(RuntimeError, match="the reading: RuntimeError: "):
            worker.call("read")
        worker.process.kill()
        with pytest.raises(RuntimeError, match="the reading ended with exit code -9"):
            worker.call("read")


def test_generation(capsys: pytest.CaptureFixture[str]) -> None:
    generation.turns("tiny", "float32", history=40, runs=1)
    assert figures(capsys)["cached / not cached"]["first token"]["median"] > 0
    generation.overhead("tiny", "float32", rows=2, steps=3)
    assert figures(capsys)["greedy"]["outside the model, per row"]["median"] > 0
    generation.prefill("tiny", "float32", length=64)
    assert figures(capsys)["prompt of 63 tokens"]["prefill"]["median"] > 0
    generation.steps("tiny", "float32", "int8", context=200, rows=2, runs=1)
    rows = figures(capsys)
    assert rows["int8"]["step after 200 tokens / after 128"]["median"] > 0


def test_ragged(capsys: pytest.CaptureFixture[str]) -> None:
    """The published loop over Meta's model answers as this library does."""
    try:
        generation.ragged("tiny", "float32", new=2, runs=1)
    finally:  # the process group that Meta's code needs
        fs_init.destroy_model_parallel()
        dist.destroy_process_group()
    rows = figures(capsys)
    assert rows["rows with the same first id"]["whole batch"]["median"] == 8
    assert rows["reference / llama3"]["whole batch"]["median"] > 0


def test_kernels(
    ops: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "COLD_BYTES", 1 << 14)
    kernels.attention(4, 2, 16, shapes="1x9,5x9,9x9", seconds=0)
    lines = capsys.readouterr().out.splitlines()[1:-1]
    assert len(lines) == 3 and all("kernel" in line and "torch" in line for line in lines)


def test_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_meta(RandomSource(TINY), None, tmp_path, torch.bfloat16)
    write_rank_file(tmp_path / "tokenizer.model", TINY["vocab_size"])
    load_benchmark.main(str(tmp_path), max_seq_len=32, tokens=2)
    rows = figures(capsys)
    assert rows["build, first"]["value"]["unit"] == "s"
    assert rows["decode, one row"]["value"]["median"] > 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generation overhead --shape 9b", "unknown shape '9b'; use one of 1b, 3b,"),
        ("generation turns --dtype int7", "unknown dtype 'int7'; use one of bfloat16,"),
        ("generation steps --quantize int9", "unknown scheme 'int9'; use int8 or int4"),
        ("generation ragged --runs 0", "--runs must be 1 or more, not 0"),
        ("kernels linear --rows a,b", "--rows must be counts such as 2,4,8, not 'a,b'"),
        ("kernels linear --rows 0", "--rows must be counts such as 2,4,8, not '0'"),
        ("kernels linear --shapes 64", "--shapes must be counts such as 8192x2048,2048x2048,"),
        ("kernels attention --threads 0", "--threads must be 1 or more, not 0"),
        ("ranks --shape 9b", "unknown shape '9b'"),
        ("load --ckpt_dir /nosuch", "no checkpoint"),
        ("random_checkpoint 9b /nosuch/out", "unknown shape '9b'"),
        ("compare speed --out /nosuch/a.json", "must name a .json file in an existing folder"),
        ("compare perplexity --file a --out a.txt", "must name a .json file in an existing folder"),
        ("train --runs 0", "--runs must be 1 or more, not 0"),
        ("differences /nosuch/a.json /nosuch/b.json", "no result at /nosuch/a.json"),
        ("checkouts /nosuch/a /nosuch/b", "/nosuch/a is not a checkout of this repository"),
        ("checkouts . . --shape 9b", "unknown shape '9b'"),
    ],
)
def test_mistakes_are_a_line(
    command: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *words = command.split()
    monkeypatch.setattr("sys.argv", [name, *words])
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # leave pytest's handlers alone
    monkeypatch.setattr(torch, "set_num_threads", lambda n: pytest.fail("threads were set"))
    monkeypatch.delitem(sys.modules, f"benchmarks.{name}", raising=False)
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    message_shown = capsys.readouterr().err
    assert caught.value.code == 2 and len(message_shown.splitlines()) == 1, message_shown
    assert message_shown.startswith(f"benchmarks.{name}: ") and message in message_shown


def test_ranks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("go\n"))
    ranks.worker("tiny", "float32", prompt=4, new=3)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["ids"]) == 3 and result["step_s"] > 0


def test_start(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    waits = "import time; print(1, flush=True); time.sleep(0.05)"
    commands = {"llama3 complete": ["-c", waits], "import torch": ["-c", "print(1)"]}
    monkeypatch.setattr(start, "COMMANDS", commands)
    start.main(runs=2)
    row = figures(capsys)["llama3 complete"]
    assert len(row["first character"]["runs"]) == 2
    assert row["first character"]["median"] < row["end"]["median"] - 0.04
    monkeypatch.setattr(start, "COMMANDS", commands | {"import torch": ["-c", "1 / 0"]})
    with pytest.raises(RuntimeError, match="1 / 0` failed"):
        start.main(runs=1)


def test_train(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(dim=32, n_layers=2, n_kv_heads=2, runs=2)
    rows = figures(capsys)
    assert rows["llama3 / transformers"]["training"]["median"] > 0
    assert len(rows["llama3"]["training"]["runs"]) == len(rows["transformers"]["training"]["runs"])
    with pytest.raises(ValueError, match="--runs must be 1 or more, not 0"):
        train.main(runs=0)
