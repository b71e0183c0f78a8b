"""Sampling against the definition of the nucleus and a plain draw over a full sort."""

from __future__ import annotations

import pytest
import torch

from llama.engine.sampling import Sampling, nucleus, sample
from llama.generation import sample_top_p
from tests import reference

PROBS = torch.tensor([0.1, 0.4, 0.2, 0.05, 0.25])  # in order: ids 1, 4, 2, 0, 3


@pytest.mark.parametrize(
    ("p", "nucleus"),
    [
        (0.0, {1}),  # top-1
        (0.39, {1}),
        (0.41, {1, 4}),  # the id that crosses p is included
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


@pytest.mark.parametrize("sharpness", [0.0, 0.3, 1.0, 3.0, 9.0])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("stable", [False, True])
def test_nucleus_equals_a_full_sort(sharpness: float, p: float, stable: bool) -> None:
    """Also where many ids are equally probable, as with logits in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        logits = (torch.randn(4, 9000) * sharpness).to(dtype).float()
        probs = torch.softmax(logits, -1)
        for rows in (probs, probs.where(probs >= probs.topk(40).values[:, -1:], 0.0)):
            weights, ids = nucleus(rows, p, stable)
            for row, weight, id in zip(rows, weights, ids, strict=True):
                values, order = row.sort(descending=True, stable=stable)
                n = int((values.cumsum(-1) - values <= p).sum())
                positive = values[:n] > 0
                assert weight[weight > 0].tolist() == values[:n][positive].tolist()
                assert id[weight > 0].tolist() == order[:n][positive].tolist()


def test_equally_probable_ids_at_the_end_of_the_nucleus() -> None:
    for seed in range(20):
        probs = torch.full((1, 5000), 1e-5)
        probs[0, torch.randperm(5000)[:8]] = 0.1
        probs /= probs.sum()
        for p in (0.0, 0.35):
            torch.manual_seed(seed)
            want = reference.draw(probs[0].clone(), p)
            torch.manual_seed(seed)
            assert sample_top_p(probs, p).item() == want


def test_seeded_draws_follow_the_nucleus() -> None:
    logits = torch.log(PROBS).repeat(4000, 1)
    drawn = sample(
        logits, Sampling(1.0, 0.7), [torch.Generator().manual_seed(i) for i in range(4000)]
    )
    assert set(drawn.tolist()) == {1, 4, 2}
    for i, prob in ((1, 0.4), (4, 0.25), (2, 0.2)):
        assert drawn.eq(i).float().mean().item() == pytest.approx(prob / 0.85, abs=0.04)


def test_input_is_not_changed() -> None:
    probs = PROBS.repeat(2, 1)
    sample_top_p(probs, 0.5)
    assert torch.equal(probs, PROBS.repeat(2, 1))


def test_temperature() -> None:
    logits = torch.log(PROBS).repeat(4000, 1)
    assert sample(logits, Sampling(0, 0.9)).eq(1).all()
    torch.manual_seed(0)
    share = sample(logits, Sampling(0.5, 1.0)).eq(1).float().mean().item()
    assert share == pytest.approx(0.16 / (PROBS**2).sum().item(), abs=0.04)


@pytest.mark.parametrize(
    ("how", "allowed"),
    [
        (Sampling(1.0, 1.0, top_k=2), {1, 4}),
        (Sampling(1.0, 1.0, top_k=1), {1}),
        (Sampling(1.0, 1.0, top_k=99), {0, 1, 2, 3, 4}),
        (Sampling(1.0, 1.0, min_p=0.45), {1, 2, 4}),  # at least 0.18
        (Sampling(1.0, 1.0, min_p=1.0), {1}),
        (Sampling(1.0, 0.7, top_k=2), {1, 4}),  # the first of the two has 0.4 / 0.65, less than 0.7
        (Sampling(1.0, 0.6, top_k=2), {1}),  # and more than 0.6
    ],
)
def test_top_k_and_min_p(how: Sampling, allowed: set[int]) -> None:
    torch.manual_seed(0)
    drawn = sample(torch.log(PROBS).repeat(4000, 1), how)
    assert set(drawn.tolist()) == allowed
    total = sum(PROBS[i].item() for i in allowed)
    for i in allowed:
        share = (drawn == i).float().mean().item()
        assert share == pytest.approx(PROBS[i].item() / total, abs=0.04)


def test_generators_make_rows_independent() -> None:
    logits = torch.randn(4, 1000)
    alone = [
        sample(logits[i : i + 1], Sampling(), [torch.Generator().manual_seed(i)]) for i in range(4)
    ]
    together = sample(logits, Sampling(), [torch.Generator().manual_seed(i) for i in range(4)])
    assert together.tolist() == [x.item() for x in alone]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"top_k": -1}, ValueError),
        ({"top_k": 1.5}, ValueError),
        ({"min_p": 1.1}, ValueError),
        ({"min_p": "x"}, TypeError),
        ({"temperature": True}, TypeError),
    ],
)
def test_bad_sampling(arguments: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(arguments))):
        Sampling(**arguments)  # type: ignore[arg-type]
