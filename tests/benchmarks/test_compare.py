"""benchmarks.compare: every system is measured, a missing or failing one is named, perplexity."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import compare, compare_perplexity, transformers_peer
from benchmarks.llama_cpp_peer import LlamaCpp
from benchmarks.ours import random_prompts
from benchmarks.peers import PACKAGES, SYSTEMS, Job, make_system, write_weights
from benchmarks.random_checkpoint import SHAPES, RandomSource
from benchmarks.same_model import differences
from llama import Llama

TINY: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
TINY |= {"vocab_size": 400, "multiple_of": 32, "use_scaled_rope": True}
SMALL_RUN: dict[str, Any] = {"prompt": 9, "long_prompt": 20, "batch": 2, "new": 4, "rounds": 2}
Figures = dict[str, dict[str, dict[str, Any]]]  # of each row, of each column


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(compare, "READ_BYTES", 1 << 20)
    yield
    assert not multiprocessing.active_children()


def last_result(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], Figures]:
    """The result in the last line of stdout, and its figures by row and column."""
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows: Figures = {}
    for figure in result["figures"]:
        rows.setdefault(figure["row"], {})[figure["column"]] = figure
    return result, rows


def job(folder: Path) -> Job:
    return Job({"norm_eps": 1e-5} | TINY, folder, "float32", rows=1, length=32)


def test_compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All peers but llama.cpp, which is skipped by name; the same weights give the same ids."""
    monkeypatch.setitem(PACKAGES, "llama.cpp", {"no_such_module": "llama-cpp-python"})
    systems = "llama3,meta,transformers-eager,transformers-sdpa,llama3-int8,llama.cpp-Q8_0"
    compare.speed("tiny", systems, "float32", **SMALL_RUN)
    result, rows = last_result(capsys)
    assert result["notes"] == ["llama.cpp-Q8_0 is skipped: it needs `pip install llama-cpp-python`"]
    plain = ["llama3 float32", "Meta's code float32", "transformers eager", "transformers sdpa"]
    ratios = [f"llama3 float32 / {peer}" for peer in plain[1:]]
    assert list(rows) == [*plain, "llama3 int8", *ratios, "llama3 int8 / llama3 float32"]
    columns = ["prefill 9", "decode after 9", "prefill 20", "decode of 2 rows"]
    for name in [*plain, "llama3 int8"]:
        row = rows[name]
        assert list(row)[:4] == columns
        assert all(len(row[c]["runs"]) == 2 and row[c]["median"] > 0 for c in columns)
        assert row["of reading"]["median"] > 0 and row["logits differ by"]["median"] < 1e-3
    assert all(rows[name]["same first id (1: yes)"]["median"] == 1 for name in plain)
    assert rows["llama3 int8"]["weights read"]["median"] < rows[plain[0]]["weights read"]["median"]
    for ratio in ratios:
        ours, theirs = (rows[name]["prefill 20"]["median"] for name in ratio.split(" / "))
        assert rows[ratio]["prefill 20"]["median"] == pytest.approx(ours / theirs)


def test_a_failing_system_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    work = compare.Work(1, 3, 2, "prefill", "decode")
    runs, reads = compare.measure(job(Path("/nosuch")), [work], ["llama3"], 1)
    assert runs[0].failure is not None and "/nosuch" in runs[0].failure and len(reads) == 1
    assert "llama3 is left out: llama3: FileNotFoundError: " in capsys.readouterr().out
    assert compare.speed_figures(runs, "float32", {}) == []
    assert compare.ratio_figures(runs, "float32") == []


def test_pairs_have_about_as_many_bits() -> None:
    found = compare.pairs(list(SYSTEMS))
    assert ("llama3", "meta") in found and ("llama3-int4", "llama.cpp-Q4_K_M") in found
    assert ("llama3-int8", "llama3") in found and ("llama3-int8", "llama.cpp-Q4_0") not in found
    assert {ours for ours, _ in found} == {"llama3", "llama3-int8", "llama3-int4"}


def test_llama_cpp(tmp_path: Path) -> None:
    """Each scheme of llama.cpp and of this library, one row and two, beside the exact logits.

    For unrelated logits, the norm of the difference is 1.4 times that of the logits.
    """
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python; docs/performance.md says how")
    plain = replace(job(tmp_path), rows=2, precise=True)
    names = [name for name, (program, _) in SYSTEMS.items() if program != "transformers"]
    names.remove("meta")
    write_weights(plain, RandomSource(plain.params), names)
    ids = torch.tensor(random_prompts(400, [30, 30]))
    expected = make_system("llama3", plain).forward(ids, 0)
    roundings = {"llama.cpp": 1e-5, "llama.cpp-Q8_0": 0.03, "llama3-int8": 0.03}
    for name in names:
        system = make_system(name, plain)
        for rows in (1, 2):
            system.forward(ids[:rows, :20], 0)
            logits = system.forward(ids[:rows, 20:], 20)
            limit = roundings.get(name, 0.5) * expected[:rows].norm()
            assert (logits - expected[:rows]).norm() < limit
    everywhere = LlamaCpp(plain.gguf(None), 1, 32, precise=True).all_logits(ids[0].tolist())
    assert torch.allclose(everywhere[-1], expected[0], atol=1e-4)


def test_perplexity(tmp_path: Path, demo_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That of this library is also `Llama`'s, for a text of one window."""
    text = "The cat sat on the mat. It was a fine day, and the cat was happy."
    (tmp_path / "a.txt").write_text(text)
    compare_perplexity.perplexity(str(tmp_path / "a.txt"), "llama3,llama3-int8", window=64)
    _, rows = last_result(capsys)
    llama = Llama.build(demo_dir, max_seq_len=64, max_batch_size=1, device="cpu", dtype="bf16")
    ids = llama.tokenizer.encode(text, bos=False)
    _, logprobs = llama.generate([ids], 0, logprobs=True, echo=True)
    assert logprobs is not None
    expected = math.exp(-sum(filter(None, logprobs[0])) / (len(ids) - 1))
    assert rows["llama3 bfloat16"]["perplexity"]["median"] == pytest.approx(expected, rel=1e-2)
    assert abs(rows["llama3 int8"]["above its bfloat16"]["median"]) < 5
    with pytest.raises(ValueError, match="meta has no perplexity"):
        compare_perplexity.perplexity("a.txt", "meta")
    with pytest.raises(ValueError, match="--window must be 2 to 512, not 1"):
        compare_perplexity.perplexity("a.txt", window=1)


def test_another_model_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert differences(job(tmp_path), ["transformers-sdpa"])["transformers-sdpa"] < 1e-5
    same = transformers_peer.config_of
    monkeypatch.setattr(
        transformers_peer, "config_of", lambda args: same(replace(args, use_scaled_rope=False))
    )
    with pytest.raises(ValueError, match="transformers-sdpa computes another model"):
        differences(job(tmp_path), ["transformers-sdpa"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"systems": "other"}, "unknown system 'other'; the systems are llama3,"),
        ({"systems": "llama3,llama3"}, "the system 'llama3' is named twice"),
        ({"systems": ""}, "--systems leaves nothing to measure"),
        ({"shape": "2b"}, "unknown shape '2b'; use one of demo, 1b, 3b,"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; use one of bfloat16,"),
        ({"new": 1}, "--new must be 2 or more, not 1"),
        ({"rounds": "many"}, "--rounds must be 1 or more, not 'many'"),
    ],
)
def test_bad_flags(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare.speed(**({"shape": "tiny"} | flags))
