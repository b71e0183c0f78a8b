"""The benchmarks run, report, and detect another model. How fast anything is, is not tested."""

from __future__ import annotations

import io
import json
import multiprocessing
import runpy
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as fs_init

from benchmarks import decode, generation, kernels, llama_cpp_peer, ranks, train, transformers_peer
from benchmarks import load as load_benchmark
from benchmarks.ours import random_prompts
from benchmarks.peers import PEERS, Job, make_system, write_weights
from benchmarks.plot import save_plot
from benchmarks.random_checkpoint import SHAPES, RandomSource, write_rank_file
from benchmarks.report import Figure
from benchmarks.same_model import differences
from benchmarks.workers import Reader, Worker
from llama.checkpoints.formats.gguf import GGUFSource
from llama.checkpoints.formats.meta_export import write_meta

TINY: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
TINY |= {"vocab_size": 400, "multiple_of": 32, "use_scaled_rope": True}
NO_LLAMA_CPP = "needs llama-cpp-python; docs/performance.md says how"
SMALL_RUN: dict[str, Any] = {"batch": 2, "prompt": 9, "context": 20, "new": 4, "runs": 2}


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(decode, "READ_BYTES", 1 << 20)
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


def check_systems(rows: Figures, names: list[str]) -> None:
    assert list(rows) == names
    for row in rows.values():
        assert row["decode"]["median"] > 0 and row["of bandwidth"]["median"] > 0
        assert len(row["first token"]["runs"]) == len(row["decode"]["runs"]) == 2
        assert 0 <= row["logits differ by"]["median"] < 1e-3


def test_decode(capsys: pytest.CaptureFixture[str]) -> None:
    decode.main("tiny", "float32", peers="reference,transformers,exact", **SMALL_RUN)
    rows = figures(capsys)
    ours = "llama3 float32"
    check_systems(rows, [ours, "reference", "transformers", f"{ours} exact"])
    # The same weights after the same context give the same ids, in each of two rows.
    assert [row["rows with the same first id"]["median"] for row in rows.values()] == [2] * 4


def test_decode_quantized(capsys: pytest.CaptureFixture[str]) -> None:
    decode.main("tiny", "bfloat16", "int4", peers="bf16", **SMALL_RUN)
    rows = figures(capsys)
    check_systems(rows, ["llama3 int4", "llama3 bfloat16"])
    sizes = [row["weights read"]["median"] for row in rows.values()]
    assert sizes[0] < sizes[1]


def test_llama_cpp(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llama_cpp", reason=NO_LLAMA_CPP)
    peers = "llama.cpp,llama.cpp-bf16"
    decode.main("tiny", "bfloat16", "int4", peers=peers, **SMALL_RUN)
    rows = figures(capsys)
    check_systems(rows, ["llama3 int4", "llama.cpp Q4_0", "llama.cpp BF16"])
    sizes = [row["weights read"]["median"] for row in rows.values()]
    assert sizes[1] < sizes[2]
    # Not zero: llama.cpp's arithmetic is not this library's.
    assert rows["llama.cpp Q4_0"]["logits differ by"]["median"] > 0


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_llama_cpp_quantized(tmp_path: Path, quantize: str) -> None:
    """Quantized weights change the logits little.

    For unrelated logits, the norm of the difference is 1.4 times that of the logits.
    """
    pytest.importorskip("llama_cpp", reason=NO_LLAMA_CPP)
    plain = replace(job(tmp_path), rows=2, quantize=quantize, precise=True)
    write_weights(plain, ["llama.cpp", "llama.cpp-bf16"])
    ids = torch.tensor(random_prompts(400, [30, 30]))
    expected = make_system("exact", plain).forward(ids, 0)
    roundings = {"llama.cpp-bf16": 1e-5, "llama.cpp": {"int8": 0.03, "int4": 0.5}[quantize]}
    for name, rounding in roundings.items():
        system = make_system(name, plain)
        system.forward(ids[:, :20], 0)
        logits = system.forward(ids[:, 20:], 20)
        assert (logits - expected).norm() < rounding * expected.norm()


def job(folder: Path) -> Job:
    params = {"norm_eps": 1e-5} | TINY
    return Job(params, folder, "float32", None, compile=False, rows=1, length=32)


def test_another_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert differences(job(tmp_path), ["transformers"])["transformers"] < 1e-5
    same = transformers_peer.config_of
    monkeypatch.setattr(
        transformers_peer, "config_of", lambda args: same(replace(args, use_scaled_rope=False))
    )
    with pytest.raises(ValueError, match="transformers computes another model"):
        differences(job(tmp_path), ["transformers"])
    assert not list(tmp_path.iterdir())


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"peers": "other"}, "unknown peer 'other'; the peers are reference,"),
        ({"peers": "exact,exact"}, "the peer 'exact' is named twice"),
        ({"shape": "2b"}, "unknown shape '2b'; use one of 1b, 3b,"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; use one of bfloat16,"),
        ({"quantize": "int2"}, "unknown scheme 'int2'; use int8 or int4"),
        ({"new": 1}, "--new must be 2 or more, not 1"),
        ({"context": -1}, "--context must be 0 or more, not -1"),
        ({"runs": "many"}, "--runs must be 1 or more, not 'many'"),
    ],
)
def test_bad_flags(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode.main(**({"shape": "tiny"} | flags))


def test_absent_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, "llama.cpp", {"no_such_module": "llama-cpp-python"})
    with pytest.raises(ImportError, match=r"'llama\.cpp' needs `pip install llama-cpp-python`"):
        decode.main("tiny", peers="llama.cpp")


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra `bench`")
    with pytest.raises(ValueError, match=r"must name a \.png file"):
        decode.main("tiny", plot=str(tmp_path / "a.pdf"))
    bars = [
        Figure(system, column, "tok/s", [9.0])
        for system in ("a", "b")
        for column in ("decode", "prefill")
    ]
    save_plot(bars, tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


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
        ("decode --out /nosuch/a.json", "must name a .json file in an existing folder"),
        ("decode --out a.txt", "must name a .json file in an existing folder"),
        ("train --runs 0", "--runs must be 1 or more, not 0"),
        ("compare /nosuch/a.json /nosuch/b.json", "no result at /nosuch/a.json"),
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


def test_train(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(dim=32, n_layers=2, n_kv_heads=2, runs=2)
    rows = figures(capsys)
    assert rows["llama3 / transformers"]["training"]["median"] > 0
    assert len(rows["llama3"]["training"]["runs"]) == len(rows["transformers"]["training"]["runs"])
    with pytest.raises(ValueError, match="--runs must be 1 or more, not 0"):
        train.main(runs=0)
