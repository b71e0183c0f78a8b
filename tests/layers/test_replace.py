"""replace_modules: exact types, everywhere in the model, without copies or leaks."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from llama.layers.replace import as_class, factory_of, replace_modules


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Norm(nn.LayerNorm):
    pass


def make_model() -> nn.Sequential:
    """Linears at three depths, one of them of a subclass, and two modules that share a weight."""
    inner = nn.ModuleDict({"a": nn.Linear(4, 4), "b": Doubling(4, 4), "norm": nn.LayerNorm(4)})
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([inner]), nn.Linear(4, 4))
    last = model[2]
    assert isinstance(last, nn.Linear) and isinstance(model[0], nn.Linear)
    last.weight = model[0].weight
    return model


def types(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


def test_exact_types_at_any_depth() -> None:
    model = make_model()
    before, names = types(model), []

    def factory(name: str, module: nn.Linear) -> nn.Module:
        names.append(name)
        assert model.get_submodule(name) is module
        return as_class(module, Doubling)

    replace_modules(model, {nn.Linear: factory, nn.LayerNorm: factory_of(Norm)})
    assert names == ["0", "1.0.a", "2"]  # not the subclass
    changed = {"0": Doubling, "1.0.a": Doubling, "2": Doubling, "1.0.norm": Norm}
    assert types(model) == before | changed


def test_a_replacement_is_not_replaced_again() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    replace_modules(model, {nn.Linear: factory_of(Doubling), Doubling: factory_of(Doubling)})
    first = model[0]
    replace_modules(model, {nn.Linear: factory_of(Doubling)})
    assert type(first) is Doubling and model[0] is first


def test_the_model_itself_is_not_replaced() -> None:
    model = nn.Linear(4, 4)
    replace_modules(model, {nn.Linear: factory_of(Doubling)})
    assert list(model.modules()) == [model]


def test_a_factory_may_keep_the_module() -> None:
    model = make_model()
    first, last = model[0], model[2]

    def only_first(name: str, module: nn.Linear) -> nn.Module:
        return as_class(module, Doubling) if name == "0" else module

    replace_modules(model, {nn.Linear: only_first})
    assert model[2] is last and model[0] is not first and type(model[0]) is Doubling


def test_weights_and_state_dict_names_stay() -> None:
    model = make_model()
    before, x = copy.deepcopy(model.state_dict()), torch.randn(3, 4)
    pointers = {name: w.data_ptr() for name, w in model.state_dict().items()}
    want = 2 * model[0](x)
    replace_modules(model, {nn.Linear: factory_of(Doubling)})
    assert list(model.state_dict()) == list(before)
    assert {name: w.data_ptr() for name, w in model.state_dict().items()} == pointers
    assert model[0].weight is model[2].weight  # still shared
    assert torch.equal(model[0](x), want)
    model.load_state_dict(before, strict=True)


def test_training_mode_and_device_of_a_replacement() -> None:
    model = make_model().eval().to(torch.bfloat16)
    replace_modules(model, {nn.Linear: factory_of(Doubling)})
    assert not any(module.training for module in model.modules())
    model.train()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("count", [1, 5])
def test_replaced_modules_and_weights_are_freed_one_by_one(count: int) -> None:
    """At most one replaced module is alive at a time, so no second copy of the weights."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))
    modules = [weakref.ref(module) for module in model]
    weights = [weakref.ref(module.weight) for module in model]
    alive: list[int] = []

    def factory(name: str, module: nn.Linear) -> nn.Module:
        alive.append(sum(ref() is not None for ref in modules))
        return nn.Identity()

    gc.collect()
    gc.disable()
    try:
        replace_modules(model, {nn.Linear: factory})
        assert alive == list(range(count, 0, -1))
        assert [ref() for ref in modules + weights] == [None] * 2 * count
    finally:
        gc.enable()
