"""Interrupted, resumed and failed training runs."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.common.files import replacing_file
from llama.train.pretraining import train
from llama.train.report import Report, read_metrics
from llama.train.settings import Settings
from tests.train.training import SMALL, contents, flags, losses, write_text

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("step", [1, 5, 7, 11])
def test_signal_and_resume(
    tmp_path: Path, text: Path, full_run: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Report.write

    def interrupting(self: Report, line: dict[str, Any]) -> None:
        write(self, line)
        if line["step"] == step - 1 or step == line["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM if step == 5 else signal.SIGINT)

    out, before = tmp_path / "run", signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Report, "write", interrupting)
        result = train(text, out, SMALL, device="cpu")
    assert result.signal == (signal.SIGTERM if step == 5 else signal.SIGINT)
    assert result.step == max(step, 2) and len(losses(out)) == result.step
    assert signal.getsignal(signal.SIGINT) is before
    result = train(text, out, SMALL, resume=True, device="cpu")
    assert result.step == 12 and result.signal is None
    assert losses(out) == losses(full_run)
    ours, theirs = contents(out), contents(full_run)
    for name in ("consolidated.00.pth", "params.json", "tokenizer.model"):
        assert ours[name] == theirs[name]


def test_data_is_flushed_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a power cut may leave an empty file in place of the old one."""
    fsync, flushed = os.fsync, []

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append((os.fstat(descriptor).st_ino, path.read_text()))

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", flush)
    with replacing_file(path) as partial:
        partial.write_text("new")
    assert flushed == [(path.stat().st_ino, "old")]
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_metrics_after_an_interrupted_write(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": i, "train_loss": 1.0 / i}) + "\n" for i in range(1, 9)]
    path.write_text("".join(lines) + '{"step": 9, "tra')
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 9))
    Report(tmp_path, 5)
    assert path.read_text() == "".join(lines[:5])


def test_metrics_before_the_first_update(tmp_path: Path) -> None:
    """An evaluation of step 0 stays, unless it will be made again."""
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 0, "val_loss": 2.0}, {"step": 1, "train_loss": 1.5}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    Report(tmp_path, 1)
    assert read_metrics(path) == lines
    Report(tmp_path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize(
    "how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_killed_command(tmp_path: Path, text: Path, how: signal.Signals) -> None:
    settings = replace(SMALL, steps=300, eval_every=20, eval_windows=4)
    full_run, out = tmp_path / "full_run", tmp_path / "run"
    train(text, full_run, settings, device="cpu")
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *flags(settings, text, out)]
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    metrics = out / "metrics.jsonl"  # some steps after the last save
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 25):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.01)
    running.send_signal(how)
    _, errors = running.communicate(timeout=120)
    assert running.returncode == (130 if how == signal.SIGINT else -9), errors.decode()
    assert b"Traceback" not in errors
    assert 20 <= len(losses(out)) < 300
    done = subprocess.run(
        [*command, "--resume"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "step 300: training loss " in done.stdout
    assert losses(out) == losses(full_run)


def test_loss_that_is_not_finite(tmp_path: Path, text: Path) -> None:
    with pytest.raises(ValueError, match=r"at step 2; no model was saved yet\. Try a lower --lr"):
        train(text, tmp_path / "run", replace(SMALL, lr=1e30, grad_clip=0.0), device="cpu")


def test_loss_that_is_not_finite_later(tmp_path: Path, text: Path) -> None:
    out, settings = tmp_path / "run", replace(SMALL, steps=10)
    train(text, out, settings, device="cpu")
    state = torch.load(out / "train/last.pt", weights_only=True)
    state["weights"]["model.output.weight"].fill_(3e38)  # finite, but no sum of two is
    torch.save(state, out / "train/last.pt")
    before = contents(out)
    with pytest.raises(ValueError, match=r"loss is nan .* at step 11; .* keeps the model of step"):
        train(text, out, replace(settings, steps=20), resume=True, device="cpu")
    assert contents(out) == before


def test_full_disk(tmp_path: Path, text: Path, full_run: Path) -> None:
    """A limit on file size makes writes fail as a full disk does."""
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:  # fails after step 5 is saved

        def full(self: Report) -> None:
            raise OSError("no space")

        patch.setattr(Report, "draw", full)
        with pytest.raises(OSError, match="no space"):
            train(text, out, SMALL, device="cpu")
    before = contents(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written; is the disk full\?"):
            train(text, out, SMALL, resume=True, device="cpu")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = contents(out)
    assert after.pop("metrics.jsonl").startswith(before.pop("metrics.jsonl"))
    assert after == before
    train(text, out, SMALL, resume=True, device="cpu")
    assert losses(out) == losses(full_run)


def test_refused(tmp_path: Path, text: Path, full_run: Path) -> None:
    before = contents(full_run)
    with pytest.raises(FileExistsError, match="already; continue the run in it with --resume"):
        train(text, full_run, SMALL)
    with pytest.raises(FileNotFoundError, match="contains no run to resume"):
        train(text, tmp_path / "none", SMALL, resume=True)
    with pytest.raises(FileExistsError, match="exists already; choose another folder for --out"):
        train(text, text, SMALL)
    other = replace(SMALL, dim=64, seed=3)
    with pytest.raises(ValueError, match="seed was 1 and is now 3; dim was 32 and is now 64"):
        train(text, full_run, other, resume=True)
    changed = write_text(tmp_path / "changed.txt", seed=1)
    with pytest.raises(ValueError, match="has changed"):
        train(changed, full_run, SMALL, resume=True)
    assert contents(full_run) == before
    (shutil.copytree(full_run, tmp_path / "gone") / "consolidated.00.pth").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"consolidated.00.pth, the model of step \d+, is m"
    ):
        train(text, tmp_path / "gone", SMALL, resume=True, device="cpu")


def test_one_run_at_a_time(
    tmp_path: Path, text: Path, full_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process cannot resume a run while it is in progress, only afterwards."""
    out, write, refused = tmp_path / "run", Report.write, []

    def interfering(self: Report, line: dict[str, Any]) -> None:
        write(self, line)
        if line["step"] == 7:
            command = [sys.executable, *flags(SMALL, text, out), "--resume"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            refused.append((done.returncode, done.stderr))

    monkeypatch.setattr(Report, "write", interfering)
    train(text, out, SMALL, device="cpu")
    ((code, message),) = refused
    assert code == 2 and f"another process trains in {out}" in message
    assert losses(out) == losses(full_run)
    assert train(text, out, SMALL, resume=True, device="cpu").step == 12


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (replace(SMALL, max_seq_len=9999), ValueError, "one window needs 10000"),
        (replace(SMALL, val_fraction=0.002), ValueError, "the validation split has .* tokens, and"),
        (replace(SMALL, tokenizer="bpe:x"), ValueError, "must be bpe:N"),
        (replace(SMALL, parallel="ddp"), ValueError, "--parallel ddp needs: torchrun"),
    ],
)
def test_a_failed_start_leaves_no_folder(
    tmp_path: Path, text: Path, settings: Settings, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(text, tmp_path / "run", settings)
    assert not list(tmp_path.iterdir())
