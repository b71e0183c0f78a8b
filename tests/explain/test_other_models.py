"""A model that is not as `Llama.build` makes it is refused, or explained as it computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llama import Llama, Transformer
from llama.explain.text import short
from llama.model import RMSNorm
from tests.explain.test_trace import IDS, build, near


class Core(nn.Module):
    def forward(self, xq: Any, keys: Any, values: Any, mask: Any, at: Any = None) -> Any:
        return xq


class Linear(nn.Module):
    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear

    def forward(self, x: Any) -> Any:
        return self.linear(x)


@pytest.fixture
def llama(folder: Path, byte_tokenizer_path: Path) -> Llama:
    return build(folder, byte_tokenizer_path)


def hook_a_block(model: Transformer) -> None:
    model.layers[1].register_forward_hook(lambda module, inputs, output: output * 1.5)


def hook_a_core(model: Transformer) -> None:
    core = model.layers[0].get_submodule("attention.core")
    core.register_forward_pre_hook(lambda module, inputs: None)


def replace_a_core(model: Transformer) -> None:
    model.layers[1].get_submodule("attention").core = Core()


def replace_a_block(model: Transformer) -> None:
    model.layers[0] = nn.Identity()


def replace_a_linear(model: Transformer) -> None:
    attention = model.layers[0].get_submodule("attention")
    attention.wq = Linear(attention.get_submodule("wq"))


def remove_a_layer(model: Transformer) -> None:
    del model.layers[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hook_a_block, r"would not run the hooks on layers\.1; remove them first"),
        (hook_a_core, r"would not run the hooks on layers\.0\.attention\.core"),
        (replace_a_core, r"layers\.1\.attention\.core is a Core; build the model anew"),
        (replace_a_block, r"layers\.0 is a Identity; build the model anew"),
        (replace_a_linear, r"layers\.0\.attention\.wq is a Linear; build the model anew"),
        (remove_a_layer, r"needs all 2 layers of the model, and it has 1"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_a_copy_would_not_compute(
    llama: Llama, change: Callable[[Transformer], None], message: str
) -> None:
    change(llama.model)
    with pytest.raises(ValueError, match=message):
        llama.explain(IDS)


def test_another_epsilon_and_a_hook_on_a_linear(llama: Llama) -> None:
    model = llama.model
    for norm in model.modules():
        if isinstance(norm, RMSNorm):
            norm.eps = 0.5
    wo = model.layers[0].get_submodule("attention.wo")
    wo.register_forward_hook(lambda module, inputs, output: output * 1.5)
    trace = llama.explain(IDS)
    with torch.no_grad():
        near(trace.logits, model(torch.tensor([IDS]))[0])


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999 "), (1000, "1 k"), (999_499, "999 k"), (999_999, "1 M"), (10**9 - 1, "1 G")],
)
def test_numbers_with_three_digits(number: int, text: str) -> None:
    assert short(number) == text
