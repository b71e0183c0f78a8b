"""Damaged files of a training run: refused before anything is written."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.train.pretraining import train
from tests.train.training import SMALL, contents, losses


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    out = tmp_path_factory.mktemp("short") / "run"
    train(text, out, replace(SMALL, steps=1), device="cpu")
    return out


NAME = "model.layers.1.attention.wk.weight"
DAMAGE: dict[str, tuple[tuple[str, ...], Any]] = {  # where in the state, and what is put there
    "no weights": (("weights",), {}),
    "a weight less": (("weights", NAME), None),
    "a weight more": (("weights", "model.extra"), torch.zeros(2)),
    "a weight of another shape": (("weights", NAME), torch.zeros(16, 31)),
    "a weight of another dtype": (("weights", NAME), torch.zeros(16, 32, dtype=torch.float64)),
    "a weight that is no number": (("weights", NAME), torch.full((16, 32), torch.nan)),
    "a sparse weight": (("weights", NAME), torch.zeros(16, 32).to_sparse()),
    "a weight without data": (("weights", NAME), torch.zeros(16, 32, device="meta")),
    "a list": (("weights", NAME), [1.0]),
    "no moments": (("optimizer", "state"), {}),
    "a moment less": (("optimizer", "state", NAME, "exp_avg"), None),
    "a short moment": (("optimizer", "state", NAME, "exp_avg"), torch.zeros(1)),
    "one number for a whole moment": (
        ("optimizer", "state", NAME, "exp_avg"),
        torch.zeros(1).expand(16, 32),
    ),
    "a moment of another dtype": (
        ("optimizer", "state", NAME, "exp_avg_sq"),
        torch.zeros(16, 32, dtype=torch.bfloat16),
    ),
    "an infinite moment": (
        ("optimizer", "state", NAME, "exp_avg_sq"),
        torch.full((16, 32), torch.inf),
    ),
    "a negative second moment": (
        ("optimizer", "state", NAME, "exp_avg_sq"),
        torch.full((16, 32), -1.0),
    ),
    "other updates": (("optimizer", "state", NAME, "step"), torch.tensor(0.0)),
    "no result": (("result",), None),
    "a result of another kind": (("result", "best_loss"), "low"),
    "an unknown result": (("result", "more"), 1),
    "a step below 1": (("result", "step"), 0),
    "not a state": ((), [1, 2]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_state_of_another_model_is_refused(
    tmp_path: Path, text: Path, short_run: Path, damage: str
) -> None:
    """Some of these went on from random weights, others wrote beyond a tensor's memory."""
    out = shutil.copytree(short_run, tmp_path / "run")
    state: Any = torch.load(out / "train/last.pt", weights_only=True)
    path, value = DAMAGE[damage]
    place = state
    for name in path[:-1]:
        place = place[name]
    if not path:
        state = value
    elif value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    torch.save(state, out / "train/last.pt")
    before = contents(out)
    with pytest.raises(ValueError, match=r"last\.pt is damaged; start a new run"):
        train(text, out, replace(SMALL, steps=3), resume=True, device="cpu")
    assert contents(out) == before


def test_the_options_of_the_optimizer_are_not_read_from_the_state(
    tmp_path: Path, text: Path, short_run: Path
) -> None:
    runs = [shutil.copytree(short_run, tmp_path / name) for name in "ab"]
    state = torch.load(runs[1] / "train/last.pt", weights_only=True)
    state["optimizer"]["param_groups"] = [{"lr": "no", "params": []}]
    torch.save(state, runs[1] / "train/last.pt")
    for run in runs:
        train(text, run, replace(SMALL, steps=3), resume=True, device="cpu")
    assert losses(runs[0]) == losses(runs[1])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("settings.json", "[]"),
        ("settings.json", "{}"),
        ("settings.json", '{"settings": 3, "data": ""}'),
        ("index.json", "nothing"),
        ("index.json", "{}"),
        ("index.json", '{"dtype": "O", "sizes": {"train": 1}, "starts": {"train": [0]}}'),
        ("index.json", '{"dtype": "<u2", "sizes": {"train": "1"}, "starts": {"train": 0}}'),
        ("index.json", '{"dtype": "<u2", "sizes": {"train": 1}, "starts": {"train": [5]}}'),
    ],
)
def test_damaged_files_of_a_run(
    tmp_path: Path, text: Path, short_run: Path, name: str, content: str
) -> None:
    out = shutil.copytree(short_run, tmp_path / "run")
    [path] = out.rglob(name)
    path.write_text(content)
    with pytest.raises(ValueError, match=r"is damaged|is not a JSON object"):
        train(text, out, replace(SMALL, steps=3), resume=True, device="cpu")


def test_damaged_metrics(tmp_path: Path, text: Path, short_run: Path) -> None:
    """Lines after a damaged one are lost; training goes on."""
    for i, bad in enumerate([b"[]", b'{"step": "1"}', b"\xff", b"[" * 10**5, b'{"step": 2}', b""]):
        out = shutil.copytree(short_run, tmp_path / str(i))
        with open(out / "metrics.jsonl", "ab") as f:
            f.write(bad + b"\n")
        train(text, out, replace(SMALL, steps=2), resume=True, device="cpu")
        assert [line["step"] for line in losses(out)] == [1, 2]


def test_damaged_state(tmp_path: Path, text: Path) -> None:
    train(text, tmp_path / "run", replace(SMALL, steps=1), device="cpu")
    path = tmp_path / "run/train/last.pt"
    content = path.read_bytes()
    for length in (0, 5000, len(content) - 1):  # torch raises a different error for each
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"last\.pt is damaged; start a new run"):
            train(text, tmp_path / "run", SMALL, resume=True, device="cpu")
