"""The one way to alter a model: its modules are replaced. Knows no particular module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

# Makes the replacement of a module from its name in the model ("layers.0.attention.wq") and itself.
Factory = Callable[[str, Any], nn.Module]
M = TypeVar("M", bound=nn.Module)


def replace_modules(model: nn.Module, table: Mapping[type[nn.Module], Factory]) -> None:
    """Replace every module of `model` whose type is in `table`, one after the other.

    A type stands for itself and not for its subclasses, so a replacement is not replaced again. A
    module whose factory returns it unchanged stays.

    Args:
        table: {type: factory(name, module) -> module}.
    """
    # Names, not modules: a list of modules would keep all of the replaced ones in memory.
    names = [name for name, module in model.named_modules() if name and type(module) in table]
    for name in names:
        module = model.get_submodule(name)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, table[type(module)](name, module))


def as_class(module: nn.Module, kind: type[M]) -> M:
    """The parameters, children and attributes of `module` as a `kind`, a subclass of its class."""
    replacement = kind.__new__(kind)
    nn.Module.__init__(replacement)
    replacement.__dict__.update(module.__dict__)
    return replacement


def factory_of(kind: type[nn.Module]) -> Factory:
    """What a table takes to replace modules by `as_class(module, kind)`."""
    return lambda name, module: as_class(module, kind)
