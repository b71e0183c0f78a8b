"""Training from nothing: `train(data, out, Settings(...))`. Imported when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama.train.loop import Result, train
    from llama.train.settings import Settings

__all__ = ["Result", "Settings", "train"]


def __getattr__(name: str) -> Any:
    """Import on first use: training needs more packages than its settings."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llama.train import loop, settings

    return getattr(settings if name == "Settings" else loop, name)
