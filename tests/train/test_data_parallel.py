"""Two gloo ranks follow one rank's losses with the batch of both, by DDP and by FSDP2, and stop."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama.train.loop import train
from tests.distributed.test_tensor_parallel import start_torchrun, torchrun
from tests.train.training import SMALL, flags, losses, write_text

TWO = replace(SMALL, batch_size=2, steps=8, eval_every=4, warmup=0, final_lr=1.0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    train(text, out, replace(TWO, batch_size=4), device="cpu")
    return out


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks(tmp_path: Path, text: Path, one: Path, kind: str) -> None:
    """Half of the steps first, then the others."""
    out = tmp_path / "run"
    settings = replace(TWO, parallel=kind, recompute=kind == "fsdp")
    printed = torchrun(2, *flags(replace(settings, steps=4), text, out))
    assert printed.count("step 4: training loss") == 1
    torchrun(2, *flags(settings, text, out), "--resume")
    found = losses(out)
    assert [line["step"] for line in found] == list(range(1, 9))
    for ours, theirs in zip(found, losses(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    expected = torch.load(one / "consolidated.00.pth", weights_only=True)
    for name, w in torch.load(out / "consolidated.00.pth", weights_only=True).items():
        torch.testing.assert_close(w, expected[name], atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_accumulating(tmp_path: Path, text: Path, one: Path, kind: str) -> None:
    settings = replace(TWO, parallel=kind, batch_size=1, accumulate=2, steps=2)
    torchrun(2, *flags(settings, text, tmp_path / "run"))
    for ours, theirs in zip(losses(tmp_path / "run"), losses(one)[:2], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_interrupted(tmp_path: Path, text: Path, kind: str) -> None:
    """All ranks stop after the same step, which is saved."""
    out, settings = tmp_path / "run", replace(TWO, parallel=kind, steps=10**6, eval_every=10**6)
    running = start_torchrun(2, *flags(settings, text, out))
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and len(losses(out)) > 5):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)  # torchrun passes it on
    printed, errors = running.communicate(timeout=120)
    step = len(losses(out))
    assert f"stopped after step {step}; the same command with --resume goes on" in printed, errors
    state = torch.load(out / "train/last.pt", weights_only=True)
    assert state["result"]["step"] == step
    moments = state["optimizer"]["state"]
    assert moments.keys() == state["weights"].keys()
    assert all(moment["step"] == step for moment in moments.values())
