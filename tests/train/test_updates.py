"""An update over rows of unequal lengths, however it is divided: over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.train.data_parallel import DataParallel
from llama.train.loop import Trainer
from llama.train.objective import Objective
from tests.distributed.test_tensor_parallel import torchrun
from tests.train.tiny_task import (
    ADAPTERS,
    METHODS,
    RUNS,
    SETTINGS,
    UPDATE,
    TinyTask,
    batch_of,
    gradients,
    row,
    run,
)
from tests.train.training import losses

ONE = DataParallel(None, torch.device("cpu"))
close: Callable[..., None] = torch.testing.assert_close


def oracle(method: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of all rows at once: a plain mean over all targets."""
    objective = TinyTask(Path(), method).objective(ONE)
    batch = batch_of([row(0, i) for i in range(UPDATE)], packed=False)
    logits = objective.model(batch.tokens)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    loss.backward()
    weights = objective.model.named_parameters()
    return float(loss.detach()), {name: w.grad for name, w in weights if w.grad is not None}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulate", [1, 2, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_accumulation_equals_a_large_batch(method: str, accumulate: int, packed: bool) -> None:
    settings = replace(SETTINGS, batch_size=UPDATE // accumulate, accumulate=accumulate)
    found = gradients(TinyTask(Path(), method, settings, packed=packed), ONE)
    _, wanted = oracle(method)
    assert found.keys() == wanted.keys()
    assert all("lora" in name for name in found) == (method in ADAPTERS)
    for name, gradient in wanted.items():
        close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(2, "-m", "tests.train.tiny_task", str(folder))
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_equal_a_large_batch(two_ranks: Path, kind: str, method: str) -> None:
    found = torch.load(two_ranks / f"{kind}-{method}.pt", weights_only=True)
    _, wanted = oracle(method)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(("kind", "method"), RUNS)
def test_a_run_on_two_ranks(tmp_path: Path, two_ranks: Path, kind: str, method: str) -> None:
    """Losses and saved state of a run with a stop half way."""
    loss, wanted = oracle(method)
    run(TinyTask(tmp_path / "one", method), ONE)
    ours, theirs = losses(two_ranks / f"{kind}-{method}"), losses(tmp_path / "one")
    assert [line["step"] for line in ours] == [0, 1, 2, 3, 4]
    rel = 0.02 if method == "bf16" else 1e-3
    assert ours[1]["train_loss"] == pytest.approx(loss, rel=rel / 100)
    for line, other in zip(ours, theirs, strict=True):
        assert line == pytest.approx(other, rel=rel)
    weights = torch.load(two_ranks / f"{kind}-{method}/train/last.pt", weights_only=True)["weights"]
    assert {name.removeprefix("model.") for name in weights} == set(wanted)


@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted(tmp_path: Path, method: str) -> None:
    """Bitwise, with dropout and recomputation; the masks differ from update to update."""
    settings = replace(SETTINGS, batch_size=4, accumulate=2, recompute=True)

    def task(name: str, **more: Any) -> TinyTask:
        return TinyTask(tmp_path / name, method, settings, dropout=0.3, **more)

    run(task("whole"), ONE)
    run(task("parts", steps=2), ONE)
    run(task("parts"), ONE, resume=True)
    states = [
        torch.load(tmp_path / name / "train/last.pt", weights_only=True)
        for name in ("whole", "parts")
    ]
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert states[0]["weights"].keys() == states[1]["weights"].keys()
    for name, w in states[0]["weights"].items():
        assert torch.equal(w, states[1]["weights"][name]), name


def test_dropout_masks_follow_from_step_and_part() -> None:
    objective = TinyTask(Path(), "lora", dropout=0.5).objective(ONE).train()
    batch = batch_of([row(0, 7)], packed=False)

    def loss(step: int, part: int) -> float:
        objective.begin(step, part)
        return float(objective(*batch).detach())

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3


def test_each_micro_batch_of_a_run_has_a_key_of_its_own() -> None:
    """Over updates, accumulation and ranks: the second of two ranks has parts 2 and 3."""
    settings = replace(SETTINGS, batch_size=2, accumulate=2)
    trainer = Trainer(TinyTask(Path(), "lora", settings, dropout=0.5), replace(ONE, rank=1, size=2))
    given = []
    begin = trainer.objective.begin

    def recorded(step: int, part: int) -> None:
        given.append((step, part))
        begin(step, part)

    trainer.objective.begin = recorded  # type: ignore[method-assign]
    for step in (0, 5):
        trainer.backward(step, trainer.task.batches(step, 1, 2), 10)
    assert given == [(0, 2), (0, 3), (5, 2), (5, 3)]


def test_evaluation_is_without_dropout(tmp_path: Path) -> None:
    run(TinyTask(tmp_path / "a", "lora", dropout=0.5), ONE)
    run(TinyTask(tmp_path / "b", "lora"), ONE)
    first, other = (losses(tmp_path / name) for name in "ab")
    assert first[0] == other[0] and first[1] != other[1]


def test_lr_scale(tmp_path: Path) -> None:
    """The first update of AdamW moves a weight by the learning rate: here B four times as far."""
    settings = replace(SETTINGS, lr=1e-3, weight_decay=0.0, grad_clip=0.0)
    task = TinyTask(tmp_path / "run", "lora", settings, steps=1)
    before = dict(task.objective(ONE).named_parameters())
    run(task, ONE)
    state = torch.load(tmp_path / "run/train/last.pt", weights_only=True)
    for name, w in state["weights"].items():
        moved = (w - before[name].detach()).abs().median()
        assert float(moved) == pytest.approx(4e-3 if "lora_b" in name else 1e-3, rel=0.05), name


def test_a_batch_without_targets() -> None:
    objective = TinyTask(Path(), "full").objective(ONE)
    batch = batch_of([row(0, 7)], packed=False)
    empty = batch._replace(targets=torch.full_like(batch.targets, -100))
    loss = objective(*empty)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert all(w.grad is not None and not w.grad.any() for w in objective.parameters())
    with torch.no_grad():
        assert float(Objective(objective.model)(*empty)) == 0.0
