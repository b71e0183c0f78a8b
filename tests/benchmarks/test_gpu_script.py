"""`benchmarks.gpu`: a rehearsal measures every part, and a part that fails does not stop others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import tables
from benchmarks.gpu.goals import goals
from benchmarks.gpu.parts import PARTS, Part, chosen
from benchmarks.gpu.record import read_entries
from benchmarks.report import Figure, load_result, make_result

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)


def test_rehearsal(tmp_path: Path) -> None:
    """Every part has figures; the page of results can show them."""
    out = tmp_path / "results"
    done = python("-m", "benchmarks.gpu", "--rehearse", "--minutes", 5, "--out", out)
    assert done.returncode == 0, done.stderr
    result = load_result(out / "gpu.json")
    logs = {part.name: (out / f"{part.name}.log").read_text()[-2000:] for part in PARTS}
    assert [part["name"] for part in result["parts"]] == [part.name for part in PARTS]
    for part in result["parts"]:
        assert part["status"] == "done", (part, result["notes"], logs[part["name"]])
    assert {figure["part"] for figure in result["figures"]} == {part.name for part in PARTS}
    assert all(figure["median"] >= 0 and figure["runs"] for figure in result["figures"])
    assert result["command"].startswith("python -m benchmarks.gpu --rehearse")
    columns = {(f["part"], f["column"]) for f in result["figures"]}
    for name in ("decode-bf16", "decode-int8", "decode-int4"):
        assert (name, "engine step") in columns
    text = "\n".join(tables.lines([result]))
    for part in PARTS:
        assert f"**{part.name}**" in text and f"{part.name}: done" in done.stdout


FAULTS = """
import os, time, subprocess, sys
from pathlib import Path
from benchmarks.gpu.parts import Part
from benchmarks.gpu.runner import run_parts, shown

def raises(run):
    run.figure("row", "before the fault", "s", [1.0])
    run.attempt("a place", lambda: 1 / 0)
    raise ValueError("first line\\nthe reason is here")

def sleeps(run):
    run.figure("row", "before the limit", "s", [2.0])
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    run.note(str(child.pid))
    time.sleep(60)

def dies(run):
    print("a last word", flush=True)
    os.kill(os.getpid(), 11)

def works(run, word):
    run.figure("row", word, "s", [3.0])

parts = [
    Part("raises", "__main__:raises", 9),
    Part("sleeps", "__main__:sleeps", 6),
    Part("dies", "__main__:dies", 9),
    Part("unknown", "no_such_module:run", 9),
    Part("works", "__main__:works", 9, ("at the end",)),
]
result = run_parts(parts, float(sys.argv[2]), Path(sys.argv[1]), True)
print("\\n".join(shown(result)))
"""


def test_faults(tmp_path: Path) -> None:
    """A part that raises, hangs, crashes or cannot be imported is one line; others go on."""
    script = tmp_path / "faults.py"
    script.write_text(FAULTS)
    done = python(script, tmp_path / "out", 60)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    states = {part["name"]: part["status"] for part in result["parts"]}
    assert states["works"] == "done" and states["raises"] == "failed in 2 places"
    assert states["sleeps"].startswith("failed: timed out after ")
    assert states["dies"] == "failed: ended with exit code -11: a last word"
    found = {figure["column"]: figure["median"] for figure in result["figures"]}
    assert found == {"before the fault": 1.0, "before the limit": 2.0, "at the end": 3.0}
    assert "raises: failed: a place: ZeroDivisionError: division by zero" in result["notes"]
    assert "raises: failed: ValueError: the reason is here" in result["notes"]
    assert any("No module named 'no_such_module'" in note for note in result["notes"])
    assert "works: done" in done.stdout and "sleeps: failed: timed out" in done.stdout
    child = next(e["note"] for e in read_entries(tmp_path / "out" / "sleeps.jsonl") if "note" in e)
    status = Path(f"/proc/{child}/status")  # ended with its parent; perhaps not yet reaped
    assert not status.is_file() or "State:\tZ" in status.read_text()


def test_no_time_left(tmp_path: Path) -> None:
    script = tmp_path / "faults.py"
    script.write_text(FAULTS)
    assert python(script, tmp_path / "out", 0.1).returncode == 0
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert {part["status"] for part in result["parts"]} == {"failed: no time was left"}
    assert result["figures"] == []


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    cases: list[tuple[list[Any], str]] = [
        (["--parts", "decode,nothing"], "there is no part 'nothing'; use some of tests, ceilings"),
        (["--parts", "ceilings", "--out", tmp_path], "has results already"),
    ]
    (tmp_path / "gpu.json").touch()
    for flags, message in cases:
        done = python("-m", "benchmarks.gpu", *flags)
        assert done.returncode == 2 and message in done.stderr


def test_chosen() -> None:
    assert [part.name for part in chosen("decode,tests")] == [
        "tests", "decode-bf16", "decode-int4", "decode-int8",
    ]  # fmt: skip
    assert chosen("") == list(PARTS) and isinstance(PARTS[0], Part)
    with pytest.raises(ValueError, match="no part 'dec'"):
        chosen("dec")


def test_goals() -> None:
    """Reached, not reached, and not measured."""
    figures = [
        Figure("bf16 compiled, batch 1, context 128", "engine step", "tok/s", [150.0]),
        Figure("bf16 compiled, batch 1, context 128", "engine step, of copy", "", [0.81]),
        Figure("int4 compiled, batch 1, context 128", "engine step", "tok/s", [300.0]),
        Figure("pytest tests/cuda", "failed", "", [2]),
        Figure("llama3, LoRA, packed, 1 x 2048 tokens", "training", "tok/s", [300.0]),
        Figure("peft, LoRA, packed, 1 x 2048 tokens", "training", "tok/s", [240.0]),
        Figure("llama3, LoRA, packed, 1 x 2048 tokens", "peak memory", "GiB", [9.0]),
        Figure("peft, LoRA, packed, 1 x 2048 tokens", "peak memory", "GiB", [10.0]),
    ]
    assert [line.removeprefix("goal: ") for line in goals(make_result("gpu", {}, figures))] == [
        "a compiled bf16 step, of copying: 0.8: 0.810, reached",
        "int4 / bf16, compiled: 2.2: 2.000, not reached",
        "bf16 prefill of 4,096, of matmul: 0.55: not measured",
        "packed LoRA / peft, speed: 1.0: 1.250, reached",
        "packed LoRA / peft, memory: at most 0.8: 0.900, not reached",
        "int4 LoRA, GiB: at most 10.0: not measured",
        "no test marked cuda fails: 2 failed",
    ]
