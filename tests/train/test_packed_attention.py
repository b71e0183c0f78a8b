"""Packed samples: each has the result that it has alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama import ModelArgs, Transformer
from llama.model import DotProductAttention
from llama.train.batch import IGNORED
from llama.train.objective import Objective, prepare_model
from llama.train.packed_attention import TrainingAttention
from tests.models import TINY, random_weights

LENGTHS = (5, 1, 9, 3)
PARAMS: dict[str, Any] = TINY | {"vocab_size": 101}


def plain_model() -> Transformer:
    model = Transformer(ModelArgs(**PARAMS, max_seq_len=16))
    model.load_state_dict(random_weights(**PARAMS))
    return model


def objective(recompute: bool = False) -> Objective:
    model = plain_model()
    prepare_model(model, recompute)
    return Objective(model)


def samples() -> tuple[Tensor, Tensor]:
    """One packed row of ids, and targets of which some are ignored; a sample's last one is."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 101, (1, sum(LENGTHS)), generator=generator)
    targets = torch.randint(0, 101, tokens.shape, generator=generator)
    targets[torch.rand(targets.shape, generator=generator) < 0.3] = IGNORED
    return tokens, targets


@pytest.mark.parametrize("recompute", [False, True])
def test_packed_is_unpacked(recompute: bool) -> None:
    """Hidden states, loss and gradients, against a plain model that is given each sample alone."""
    tokens, targets = samples()
    ours, plain = objective(recompute), plain_model()
    alone = [plain.hidden(ids) for ids in tokens.split(LENGTHS, dim=1)]
    found = ours.hidden(tokens, LENGTHS)
    torch.testing.assert_close(found, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)
    logits = [plain.logits(h) for h in alone]
    joined = torch.cat(logits, dim=1).flatten(0, 1)
    wanted = F.cross_entropy(joined, targets.flatten(), reduction="sum")
    loss = ours(tokens, targets, LENGTHS)
    (loss / 10).backward()
    (wanted / 10).backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for (name, w), other in zip(ours.model.named_parameters(), plain.parameters(), strict=True):
        assert w.grad is not None and other.grad is not None
        torch.testing.assert_close(w.grad, other.grad, atol=1e-5, rtol=1e-5, msg=name)


def test_a_block_diagonal_mask_says_the_same() -> None:
    """Through the plain attention, with positions that restart."""
    tokens, _ = samples()
    model = plain_model()
    of_sample = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    mask = (of_sample.unsqueeze(1) == of_sample) & torch.ones(18, 18, dtype=torch.bool).tril()
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    h = model.embed(tokens)
    for layer in model.layers:
        h = layer(h, model.freqs_cis[positions], mask)
    found = objective().hidden(tokens, LENGTHS)
    torch.testing.assert_close(found, model.norm(h), atol=1e-5, rtol=1e-5)


def test_changing_a_sample_leaves_the_others_bit_identical() -> None:
    tokens, _ = samples()
    ours = objective()
    changed = tokens.clone()
    changed[0, 6:15] = (changed[0, 6:15] + 1) % 101  # the third
    before, after = ours.hidden(tokens, LENGTHS), ours.hidden(changed, LENGTHS)
    assert torch.equal(before[:, :6], after[:, :6]) and torch.equal(before[:, 15:], after[:, 15:])
    assert not torch.isclose(before[:, 6:15], after[:, 6:15]).all()


@pytest.mark.parametrize("lengths", [None, (16,)])
def test_one_sample_a_row(lengths: tuple[int, ...] | None) -> None:
    """Loss and gradients of the plain model, packed or not."""
    ids, targets = (x[:, :16] for x in samples())
    ours, plain = objective(), plain_model()
    wanted = F.cross_entropy(plain(ids).flatten(0, 1), targets.flatten(), reduction="sum")
    loss = ours(ids, targets, lengths)
    torch.testing.assert_close(loss, wanted, atol=0, rtol=1e-5)
    torch.autograd.backward((loss / 10, wanted / 10))
    for w, other in zip(ours.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(w.grad, other.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [40, 600])
def test_bfloat16(length: int) -> None:
    """Both ways to compute it are near the plain attention in fp32."""
    generator = torch.Generator().manual_seed(2)
    xq, keys, values = (torch.randn(1, length, h, 16, generator=generator) for h in (4, 2, 2))
    wanted = DotProductAttention()(xq, keys, values, None)
    found = TrainingAttention()(xq.bfloat16(), keys.bfloat16(), values.bfloat16(), None)
    torch.testing.assert_close(found.float(), wanted, atol=0.03, rtol=0.03)


def test_recomputation_after_another_batch() -> None:
    """Each backward pass has the lengths of its own batch."""
    tokens, targets = samples()
    gradients = []
    for recompute in (False, True):
        ours = objective(recompute)
        first, second = (ours(tokens, targets, n) for n in (LENGTHS, (9, 9)))
        torch.autograd.backward((first, second))
        gradients.append([w.grad for w in ours.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_lengths_must_fill_the_row() -> None:
    tokens, targets = samples()
    with pytest.raises(ValueError, match="2 packed samples of 9 tokens need one row"):
        objective()(tokens, targets, (4, 5))
