"""Opens the model that a verb's flags describe."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Annotated

from llama.checkpoints.demo_model import cache_dir, checkpoint_or_demo
from llama.commands.options import Only
from llama.common.options import option
from llama.generation import BuildOptions, Llama


@dataclass(frozen=True)
class CheckpointFlags:
    """Which checkpoint to open."""

    ckpt_dir: str | None = option(None, "a checkpoint of any layout; by default the demo model")
    tokenizer_path: str | None = option(
        None, "its tokenizer.model; by default the one that came with it"
    )


# The build options of a verb that generates.
BuildFlags = Annotated[
    BuildOptions, Only("max_seq_len", "seed", "quantize", "compile", "device", "dtype")
]


def open_model(checkpoint: CheckpointFlags, build: BuildOptions) -> Llama:
    """The model of a checkpoint, or the demo model."""
    folder, tokenizer = checkpoint_or_demo(checkpoint.ckpt_dir, checkpoint.tokenizer_path)
    if build.compile:  # torch's own cache is in /tmp, which is emptied when the machine starts
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
    return Llama.build(folder, tokenizer, **asdict(build))
