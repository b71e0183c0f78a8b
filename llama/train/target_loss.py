"""Cross-entropy at the trained positions only, without the scores of all of them at once.

Shapes: n targets, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llama.train.batch import IGNORED

SCORES = 1 << 25  # logits computed at once: 128 MiB in fp32


def target_loss(output: nn.Module, hidden: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """The sum of -log p(target) in nats: a scalar, fp32.

    Args:
        output: (..., dim) -> logits (..., V): a plain or a quantized linear, trained or not.
        hidden: (B, T, dim), normed.
        targets: (B, T) int64; positions with IGNORED do not count.
        chunk: positions whose logits are computed at once.
    """
    flat = targets.flatten()
    index = (flat != IGNORED).nonzero().squeeze(1)  # (n,)
    hidden = hidden.flatten(0, 1)
    if len(index) < len(flat):
        hidden, flat = hidden.index_select(0, index), flat.index_select(0, index)
    if not torch.is_grad_enabled():
        parts = zip(hidden.split(chunk), flat.split(chunk), strict=True)
        return torch.stack([nats_and_p(output(h), y)[0] for h, y in parts]).sum()
    trained = [w for w in output.parameters() if w.requires_grad]
    loss: Tensor = _TargetLoss.apply(output, chunk, flat, hidden, *trained)  # type: ignore[no-untyped-call]
    return loss


def nats_and_p(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of -log p(target), and p of every id (n, V), both fp32.

    The logits may be overwritten.
    """
    p = logits.detach().float()
    p -= p.amax(-1, keepdim=True)
    of_targets = p.gather(1, targets.unsqueeze(1))
    total = p.exp_().sum(-1, keepdim=True)
    return (total.log() - of_targets).sum(), p.div_(total)


class _TargetLoss(torch.autograd.Function):
    """Takes the gradient of each chunk of targets in the forward pass.

    The gradient of a sum is known before the backward pass, up to a factor.
    """

    @staticmethod
    def forward(
        ctx: Any, output: nn.Module, chunk: int, targets: Tensor, hidden: Tensor, *trained: Tensor
    ) -> Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradients = [torch.zeros_like(x) for x in (hidden, *trained)]
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            with torch.enable_grad():
                h = hidden[part].detach().requires_grad_()
                logits = output(h)
            nats, p = nats_and_p(logits, targets[part])
            loss += nats
            ids = targets[part].unsqueeze(1)
            p.scatter_add_(1, ids, p.new_full(ids.shape, -1.0))  # the gradient of the logits
            found = torch.autograd.grad(logits, (h, *trained), p.to(logits.dtype))
            gradients[0][part] = found[0]
            for total, gradient in zip(gradients[1:], found[1:], strict=True):
                total += gradient
        ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # a second backward pass would scale again
        return None, None, None, *(gradient.mul_(factor) for gradient in gradients)
