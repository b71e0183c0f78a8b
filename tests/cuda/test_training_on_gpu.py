"""Training steps on a GPU are those of the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.train import updates
from llama import ModelArgs, Transformer
from llama.train.objective import Objective, prepare_model
from llama.train.optimizer import initialize
from llama.train.settings import Settings
from tests.cuda.cases import DEVICE, SHAPES

pytestmark = pytest.mark.cuda


def trained(
    device: torch.device, dtype: str, recompute: bool = False
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and weights of four updates on one batch."""
    settings = Settings(dim=256, dtype=dtype, lr=1e-3)
    model = Transformer(ModelArgs(**SHAPES["heads of 64"], max_seq_len=32)).to(device)
    prepare_model(model, recompute)
    initialize(model, seed=1)
    objective = Objective(model)
    update = updates(objective, lambda x: objective(x[:, :-1], x[:, 1:]) / 128, settings, device)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 512, (4, 33), generator=generator).to(device)
    losses = [update(ids) for _ in range(4)]
    return losses, {name: w.detach().cpu() for name, w in model.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True])
def test_fp32(recompute: bool) -> None:
    (found, weights), (wanted, others) = (
        trained(DEVICE, "float32", recompute),
        trained(torch.device("cpu"), "float32"),
    )
    assert found == pytest.approx(wanted, abs=1e-3) and found[-1] < found[0]
    for name, weight in weights.items():
        # AdamW divides by the size of a gradient, so that rounding of a tiny one shows.
        assert (weight - others[name]).abs().mean() < 2e-4, name


def test_bf16() -> None:
    found, _ = trained(DEVICE, "bfloat16")
    wanted, _ = trained(torch.device("cpu"), "float32")
    assert found == pytest.approx(wanted, abs=0.05)
