"""Training: data -> token ids -> batches -> a checkpoint or an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama.train.finetune_settings import FinetuneSettings
from llama.train.settings import Settings

if TYPE_CHECKING:
    from llama.train.finetuning import finetune
    from llama.train.loop import Result
    from llama.train.pretraining import train

__all__ = ["FinetuneSettings", "Result", "Settings", "finetune", "train"]


def __getattr__(name: str) -> Any:
    """Import the loop when it is used: it needs numpy, and flags need only the settings."""
    if name == "finetune":
        from llama.train import finetuning

        return finetuning.finetune
    if name in ("Result", "train"):
        from llama.train import pretraining

        return getattr(pretraining, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
