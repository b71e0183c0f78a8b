"""The benchmarks run and report, on a tiny shape; their figures are not tested."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from benchmarks import decode, generation, ranks
from benchmarks.random_checkpoint import SHAPES

TINY: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
TINY |= {"vocab_size": 400, "multiple_of": 32}


@pytest.fixture(autouse=True)
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(decode, "read_bandwidth", lambda: 1e10)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_decode(capsys: pytest.CaptureFixture[str], quantize: str | None) -> None:
    peers = "transformers,exact" if quantize is None else "bf16"
    decode.main("tiny", "float32", quantize, batch=2, prompt=9, new=4, runs=2, peers=peers)
    rows = last_line(capsys)["rows"]
    assert len(rows) == (3 if quantize is None else 2)
    assert all(row["decode_tok_s"] > 0 and row["first_token_s"] > 0 for row in rows)
    if quantize is None:  # the same weights give the same first ids
        assert [row["same_first_id"] for row in rows] == [2, 2, 2]


def test_generation(capsys: pytest.CaptureFixture[str]) -> None:
    generation.turns("tiny", "float32", history=40, runs=1)
    assert last_line(capsys)["ratio"] > 0
    generation.overhead("tiny", "float32", rows=2, steps=3)
    assert last_line(capsys)["greedy_ms_per_row"] > 0
    generation.prefill("tiny", "float32", length=64)
    assert last_line(capsys)["tok_per_s"] > 0


def test_ranks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("go\n"))
    ranks.worker("tiny", "float32", prompt=4, new=3)
    result = last_line(capsys)
    assert len(result["ids"]) == 3 and result["step_s"] > 0


def test_unknown_peer() -> None:
    with pytest.raises(ValueError, match="unknown peer 'other'"):
        decode.main("tiny", "float32", prompt=4, new=3, runs=1, peers="other")
