"""data_parallel.py: two gloo ranks, with DDP and FSDP2, against one rank with twice the batch."""

from __future__ import annotations

import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama.train.pretraining import train
from tests.distributed.test_tensor_parallel import start_torchrun, torchrun
from tests.train.training import SMALL, flags, losses

TWO_RANKS = replace(SMALL, batch_size=2, steps=8, eval_every=4, warmup=0, final_lr=1.0)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    out = tmp_path_factory.mktemp("one") / "run"
    train(text, out, replace(TWO_RANKS, batch_size=4), device="cpu")
    return out


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_match_one(tmp_path: Path, text: Path, one_rank: Path, kind: str) -> None:
    """Also with a resumption half way."""
    out = tmp_path / "run"
    settings = replace(TWO_RANKS, parallel=kind, recompute=kind == "fsdp")
    printed = torchrun(2, *flags(replace(settings, steps=4), text, out))
    assert printed.count("step 4: training loss") == 1
    torchrun(2, *flags(settings, text, out), "--resume")
    found = losses(out)
    assert [line["step"] for line in found] == list(range(1, 9))
    for ours, theirs in zip(found, losses(one_rank), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    expected = torch.load(one_rank / "consolidated.00.pth", weights_only=True)
    for name, w in torch.load(out / "consolidated.00.pth", weights_only=True).items():
        torch.testing.assert_close(w, expected[name], atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_accumulation_on_two_ranks(tmp_path: Path, text: Path, one_rank: Path, kind: str) -> None:
    settings = replace(TWO_RANKS, parallel=kind, batch_size=1, accumulate=2, steps=2)
    torchrun(2, *flags(settings, text, tmp_path / "run"))
    for ours, theirs in zip(losses(tmp_path / "run"), losses(one_rank)[:2], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_interrupt_saves_and_stops_all_ranks(tmp_path: Path, text: Path, kind: str) -> None:
    """All ranks stop after the same step, and that step is saved."""
    out, settings = (
        tmp_path / "run",
        replace(TWO_RANKS, parallel=kind, steps=10**6, eval_every=10**6),
    )
    running = start_torchrun(2, *flags(settings, text, out))
    deadline = time.monotonic() + 120
    while not ((out / "metrics.jsonl").exists() and len(losses(out)) > 5):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)  # torchrun forwards it
    printed, errors = running.communicate(timeout=120)
    step = len(losses(out))
    assert f"stopped after step {step}; the same command with --resume goes on" in printed, errors
    state = torch.load(out / "train/last.pt", weights_only=True)
    assert state["result"]["step"] == step
    moments = state["optimizer"]["state"]
    assert moments.keys() == state["weights"].keys()
    assert all(moment["step"] == step for moment in moments.values())
