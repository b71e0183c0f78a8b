"""Replaces modules of a model by others. Knows no particular module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

# factory(name, module) -> replacement. `name` is as in the state dict: "layers.0.attention.wq".
Factory = Callable[[str, Any], nn.Module]
M = TypeVar("M", bound=nn.Module)


def replace_modules(model: nn.Module, table: Mapping[type[nn.Module], Factory]) -> None:
    """Replace every module of `model` whose type is in `table`, one after the other.

    Subclasses of a type in the table are not replaced, so a replacement is not replaced again. A
    factory may return the module itself, which keeps it.

    Args:
        table: {type: factory(name, module) -> module}.
    """
    # Names, not modules: a list of modules would keep every replaced module in memory.
    names = [name for name, module in model.named_modules() if name and type(module) in table]
    for name in names:
        module = model.get_submodule(name)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, table[type(module)](name, module))


def as_class(module: nn.Module, kind: type[M]) -> M:
    """A `kind` with the module's parameters, children and attributes; a subclass of its class."""
    replacement = kind.__new__(kind)
    nn.Module.__init__(replacement)
    replacement.__dict__.update(module.__dict__)
    for own in ("_parameters", "_buffers", "_modules"):  # a change must not reach `module`
        replacement.__dict__[own] = module.__dict__[own].copy()
    return replacement


def factory_of(kind: type[nn.Module]) -> Factory:
    """A factory that returns `as_class(module, kind)`."""
    return lambda name, module: as_class(module, kind)
