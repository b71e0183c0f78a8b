"""Refuses to compute in a forked process, where torch would wait for threads that do not exist."""

from __future__ import annotations

import os

import torch

_watching = False
_forked = False


def watch_forks() -> None:
    """From now on, remember in each child whether it was forked. For the first use of an engine."""
    global _watching
    if not _watching and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_set_forked)
    _watching = True


def _set_forked() -> None:
    global _forked
    _forked = True


def check_not_forked(device: torch.device) -> None:
    """Check that torch can compute here on several threads.

    `fork` copies only the thread that calls it, not those that OpenMP keeps for the next operator.
    On a GPU torch refuses by itself.

    Raises:
        RuntimeError: an engine was made before this process was forked.
    """
    if _forked and device.type == "cpu" and torch.get_num_threads() > 1:
        raise RuntimeError(
            "this process was forked from one that had built a model, so torch would wait here for "
            "threads that do not exist. Start it with multiprocessing.get_context('spawn'), or "
            "build models only in the forked processes, or call torch.set_num_threads(1) first"
        )
