"""Draws without a seed are those of Meta's code on the same GPU after `torch.manual_seed`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llama import Engine, Request, Sampling, Transformer
from tests.cuda.cases import DEVICE, make_model, prompt

pytestmark = pytest.mark.cuda
HOW = Sampling(0.9, 0.8)


@torch.inference_mode()
def by_multinomial(model: Transformer, ids: Tensor, new: int) -> list[list[int]]:
    """The published loop: the whole sequence again for each id, and a draw from the sorted row."""
    torch.manual_seed(11)
    length = ids.shape[1]
    for _ in range(new):
        probs = torch.softmax(model(ids)[:, -1] / HOW.temperature, dim=-1)
        values, order = torch.sort(probs, dim=-1, descending=True)
        before = torch.cumsum(values, dim=-1) - values
        values = values.masked_fill(before > HOW.top_p, 0.0)
        values = values / values.sum(dim=-1, keepdim=True)
        drawn = torch.multinomial(values, num_samples=1)
        ids = torch.cat([ids, order.gather(-1, drawn)], dim=1)
    return ids[:, length:].tolist()


@pytest.mark.parametrize("rows", [1, 2])
def test_unseeded_draws(engine: Engine, rows: int) -> None:
    """The engine chooses which of its rows is the first."""
    prompts, model = [prompt(12, seed=i) for i in range(rows)], make_model("heads of 64")
    possible = []
    for step in (1, -1):
        wanted = by_multinomial(model, torch.tensor(prompts[::step], device=DEVICE), 25)
        possible.append(wanted[::step])
    for _ in range(2):  # again: a graph that was captured in between draws the same
        torch.manual_seed(11)
        found = engine.run([Request(ids, 25, HOW, reuse=False) for ids in prompts])
        assert [generation.ids for generation in found] in possible


def test_unseeded_draws_differ_from_call_to_call(engine: Engine) -> None:
    request = Request(prompt(12), 25, Sampling(1.5, 1.0))
    found = [tuple(engine.run([request])[0].ids) for _ in range(4)]
    assert len(set(found)) == 4


def test_draws_follow_the_distribution(engine: Engine) -> None:
    """First and later ids of many requests, against the probabilities of the plain model."""
    ids = prompt(12)
    with torch.inference_mode():
        logits = make_model("heads of 64")(torch.tensor([ids], device=DEVICE))[0, -1]
    wanted = torch.softmax(logits / 0.5, -1)
    torch.manual_seed(3)
    how, n = Sampling(0.5, 1.0), 400
    drawn = [generation.ids[0] for generation in engine.run([Request(ids, 1, how)] * n)]
    top = int(wanted.argmax())
    expected, spread = n * float(wanted[top]), (n * float(wanted[top])) ** 0.5
    assert abs(drawn.count(top) - expected) < 4 * spread + 1


def test_mixed_sampling_in_a_step(engine: Engine) -> None:
    """Greedy, seeded and unseeded rows beside each other do not change the first two."""
    seeded = Request(prompt(6), 15, HOW, seed=4)
    greedy = Request(prompt(7), 15, Sampling(0.0))
    sharp = Request(prompt(8), 15, Sampling(1.0, 0.9, top_k=3), seed=9)
    alone = [engine.run([request])[0].ids for request in (seeded, greedy, sharp)]
    together = engine.run([seeded, greedy, sharp, Request(prompt(9), 15, HOW)])
    assert [generation.ids for generation in together[:3]] == alone
