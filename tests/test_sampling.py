"""sampling.py against the definition of the nucleus and a plain full-sort draw."""

from __future__ import annotations

import pytest
import reference
import torch

from llama.generation import sample_top_p
from llama.sampling import sample

PROBS = torch.tensor([0.1, 0.4, 0.2, 0.05, 0.25])  # in order: ids 1, 4, 2, 0, 3


@pytest.mark.parametrize(
    ("p", "nucleus"),
    [
        (0.0, {1}),  # top-1
        (0.39, {1}),
        (0.41, {1, 4}),  # the id that crosses p belongs to it
        (0.7, {1, 4, 2}),
        (0.86, {1, 4, 2, 0}),
        (1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_nucleus(p: float, nucleus: set[int]) -> None:
    torch.manual_seed(0)
    drawn = sample_top_p(PROBS.repeat(4000, 1), p).flatten()
    assert set(drawn.tolist()) == nucleus
    total = sum(PROBS[i].item() for i in nucleus)
    for i in nucleus:  # renormalized; 4000 draws have a standard error below 0.008
        share = (drawn == i).float().mean().item()
        assert share == pytest.approx(PROBS[i].item() / total, abs=0.04)


def test_draws_equal_a_full_sort_and_multinomial() -> None:
    for seed in range(50):
        probs = torch.softmax(torch.randn(1, 5000) * 3, -1)
        torch.manual_seed(seed)
        want = reference.draw(probs[0].clone(), 0.9)
        torch.manual_seed(seed)
        got = sample_top_p(probs, 0.9)
        assert got.shape == (1, 1) and got.item() == want


def test_input_is_left_alone() -> None:
    probs = PROBS.repeat(2, 1)
    sample_top_p(probs, 0.5)
    assert torch.equal(probs, PROBS.repeat(2, 1))


def test_temperature() -> None:
    logits = torch.log(PROBS).repeat(4000, 1)
    assert sample(logits, 0, 0.9).eq(1).all()
    torch.manual_seed(0)
    share = sample(logits, 0.5, 1.0).eq(1).float().mean().item()
    assert share == pytest.approx(0.16 / (PROBS**2).sum().item(), abs=0.04)
