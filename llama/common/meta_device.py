"""Modules with shapes and dtypes, but without memory and initial values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _SkipInitialValues(TorchFunctionMode):
    """Makes the functions of `torch.nn.init` return their tensor as it is."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """Modules that are built in this block are on the meta device.

    Drawing initial values there would import torch._dynamo. That takes most of a second, and the
    import keeps the frames of all its callers, and so their models, until garbage is collected.
    """
    with torch.device("meta"), _SkipInitialValues():
        yield
