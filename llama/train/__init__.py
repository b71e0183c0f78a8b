"""Training: data -> token ids -> batches -> a checkpoint or an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama.train.settings import Settings

if TYPE_CHECKING:
    from llama.train.loop import Result
    from llama.train.pretraining import train

__all__ = ["Result", "Settings", "train"]


def __getattr__(name: str) -> Any:
    """Import the loop when it is used: it needs numpy, and flags need only the settings."""
    if name in ("Result", "train"):
        from llama.train import pretraining

        return getattr(pretraining, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
