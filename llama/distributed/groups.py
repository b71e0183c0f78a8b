"""fairscale's modules, imported once there is a process group: one rank need not wait for them.

Knows no rank and no tensor.
"""

from __future__ import annotations

import contextlib
from importlib import import_module
from typing import Any

import torch.distributed as dist

initialize: Any = None  # fairscale.nn.model_parallel.initialize
mappings: Any = None  # fairscale.nn.model_parallel.mappings


def is_installed() -> bool:
    """Whether there is a fairscale; imports its modules."""
    global initialize, mappings
    if initialize is None:
        with contextlib.suppress(ModuleNotFoundError):  # one rank runs without it
            initialize = import_module("fairscale.nn.model_parallel.initialize")
            mappings = import_module("fairscale.nn.model_parallel.mappings")
    return initialize is not None


def is_initialized() -> bool:
    """Whether this process is in a model-parallel group."""
    if not dist.is_initialized():
        return False
    return is_installed() and bool(initialize.model_parallel_is_initialized())
