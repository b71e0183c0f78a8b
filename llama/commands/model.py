"""Opens the model that a verb's flags describe."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from llama.checkpoints.demo_model import cache_dir, checkpoint_or_demo
from llama.commands.options import Only
from llama.common.options import option
from llama.generation import BuildOptions, Llama


@dataclass(frozen=True)
class CheckpointFlags:
    """Which checkpoint to open.

    Raises:
        ValueError: the flags exclude each other.
    """

    ckpt_dir: str | None = option(None, "a checkpoint of any layout; by default the demo model")
    hf: str | None = option(
        None, "instead, a repository of the Hugging Face hub, OWNER/NAME; downloaded once"
    )
    tokenizer_path: str | None = option(
        None, "its tokenizer.model; by default the one that came with it"
    )

    def __post_init__(self) -> None:
        if self.hf is not None and self.ckpt_dir is not None:
            raise ValueError("--ckpt_dir and --hf: give one of them")
        if self.tokenizer_path is not None and self.hf is None and self.ckpt_dir is None:
            raise ValueError(
                "--tokenizer_path without --ckpt_dir: give both, or neither for the demo model"
            )


# The build options of a verb that generates.
BuildFlags = Annotated[
    BuildOptions,
    Only(
        *("max_seq_len", "seed", "quantize", "compile", "speculate", "draft"),
        *("device", "dtype", "adapter"),
    ),
]


def open_model(checkpoint: CheckpointFlags, build: BuildOptions) -> Llama:
    """The model of a checkpoint, of the hub, or the demo model."""
    if checkpoint.hf is not None:
        from llama.checkpoints.download import download_once

        folder: Path = download_once(checkpoint.hf, cache_dir() / "hf")
        tokenizer = None if checkpoint.tokenizer_path is None else Path(checkpoint.tokenizer_path)
    else:
        if checkpoint.ckpt_dir is not None:
            check_local(checkpoint.ckpt_dir)
        folder, tokenizer = checkpoint_or_demo(checkpoint.ckpt_dir, checkpoint.tokenizer_path)
    if build.compile:  # torch's own cache is in /tmp, which is emptied when the machine starts
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
    return Llama.build(folder, tokenizer, **asdict(build))


def check_local(path: str) -> None:
    """Raise a FileNotFoundError for a name of the Hugging Face hub that is not a local path."""
    if re.fullmatch(r"https?://\S+|[\w.-]+/[\w.-]+", path) and not Path(path).exists():
        raise FileNotFoundError(
            f"there is no checkpoint at {path}; if it is a repository of the Hugging Face hub, "
            f"download it first: llama3 download {path}"
        )
