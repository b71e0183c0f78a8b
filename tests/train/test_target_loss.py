"""target_loss.py against F.cross_entropy over all logits, and what it computes at once."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.layers.quantized_linear import Int8Linear
from llama.train.batch import IGNORED
from llama.train.target_loss import target_loss

DIM, VOCABULARY = 24, 67


class Widest(nn.Linear):
    """A linear that records for how many positions it was called at most."""

    most = 0

    def forward(self, x: Tensor) -> Tensor:
        self.most = max(self.most, x.numel() // x.shape[-1])
        return super().forward(x)


def case(share: float) -> tuple[Widest, Tensor, Tensor]:
    """An output, hidden states (3, 11, DIM), and targets of which about `share` count."""
    torch.manual_seed(3)
    targets = torch.randint(0, VOCABULARY, (3, 11))
    targets[torch.rand(targets.shape) >= share] = IGNORED
    return Widest(DIM, VOCABULARY, bias=False), torch.randn(3, 11, DIM), targets


def oracle(output: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = output(hidden).flatten(0, 1).float()
    return F.cross_entropy(logits, targets.flatten(), reduction="sum")


@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("trained", [True, False])
def test_loss_and_gradients(share: float, chunk: int, trained: bool) -> None:
    output, hidden, targets = case(share)
    output.requires_grad_(trained)
    inputs = [hidden.requires_grad_(), *([output.weight] if trained else [])]
    wanted = oracle(output, hidden, targets)
    gradients = torch.autograd.grad(wanted * 0.3, inputs)
    output.most = 0
    found = target_loss(output, hidden, targets, chunk)
    assert output.most == min(chunk, int((targets != IGNORED).sum()))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-6)
    (found * 0.3).backward()
    assert output.weight.grad is None or trained
    for x, gradient in zip(inputs, gradients, strict=True):
        torch.testing.assert_close(x.grad, gradient, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(target_loss(output, hidden, targets, chunk), found.detach())


def test_scores_are_not_kept_for_the_backward_pass() -> None:
    output, hidden, targets = case(1.0)
    hidden.requires_grad_()
    sizes: list[int] = []

    def pack(x: Tensor) -> Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        target_loss(output, hidden, targets, 4)
    assert max(sizes) <= max(hidden.numel(), output.weight.numel())  # and not 33 * VOCABULARY


def test_tied_with_the_embedding() -> None:
    """The shared weight has the gradient of both uses."""
    output, _, targets = case(0.5)
    tokens = torch.randint(0, VOCABULARY, targets.shape)

    def embedded() -> Tensor:
        return F.embedding(tokens, output.weight).cumsum(1)

    [wanted] = torch.autograd.grad(oracle(output, embedded(), targets), output.weight)
    target_loss(output, embedded(), targets, 4).backward()
    torch.testing.assert_close(output.weight.grad, wanted, atol=1e-4, rtol=1e-5)


def test_bfloat16_by_autocast() -> None:
    output, hidden, targets = case(0.7)
    hidden.requires_grad_()
    gradients = []
    for loss_of in (oracle, partial(target_loss, chunk=7)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(output, hidden, targets)
        gradients.append(torch.autograd.grad(loss, (hidden, output.weight)))
        assert loss.dtype == torch.float32
    for wanted, found in zip(*gradients, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, atol=0.03, rtol=0.03)


def test_quantized_output() -> None:
    """The gradient of the hidden states is that of the weight which the codes stand for."""
    plain, hidden, targets = case(0.7)
    output = Int8Linear(plain.weight.detach())
    with torch.no_grad():
        plain.weight.copy_(output.q.float() * output.scale.unsqueeze(-1))
    wanted = torch.autograd.grad(oracle(plain, hidden.requires_grad_(), targets), hidden)
    found = torch.autograd.grad(target_loss(output, hidden, targets, 7), hidden)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-2)
