"""Opens the model that a verb's flags describe."""

from __future__ import annotations

import os
from dataclasses import dataclass

from llama.checkpoints.demo_model import cache_dir, checkpoint_or_demo
from llama.common.dtypes import parse_dtype
from llama.common.options import option
from llama.generation import Llama


@dataclass(frozen=True)
class ModelFlags:
    """Which model to open, and how: see `Llama.build`."""

    ckpt_dir: str | None = option(None, "a checkpoint of any layout; by default the demo model")
    tokenizer_path: str | None = option(
        None, "its tokenizer.model; by default the one that came with it"
    )
    max_seq_len: int | None = option(
        None,
        "most tokens of prompt and answer, in a chat of the whole dialog; "
        "by default as trained, at most 4096",
    )
    seed: int = option(1, "the same seed draws the same tokens")
    quantize: str | None = option(
        None, "int8 or int4: keep the layers' weights in so many bits; by default as stored"
    )
    compile: bool = option(False, "decode by a compiled step")
    device: str | None = option(
        None, "auto, cpu, cuda, cuda:1, mps, ...; by default (auto) the fastest one there is"
    )
    dtype: str | None = option(
        None, "auto, bf16, fp16 or fp32; by default (auto) what suits the device"
    )


def open_model(flags: ModelFlags, max_batch_size: int = 1) -> Llama:
    """The model of a checkpoint, or the demo model."""
    folder, tokenizer = checkpoint_or_demo(flags.ckpt_dir, flags.tokenizer_path)
    if flags.compile:  # torch's own cache is in /tmp, which is emptied when the machine starts
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
    return Llama.build(
        ckpt_dir=folder,
        tokenizer_path=tokenizer,
        max_seq_len=flags.max_seq_len,
        max_batch_size=max_batch_size,
        seed=flags.seed,
        device=None if flags.device == "auto" else flags.device,
        dtype=parse_dtype(flags.dtype),
        quantize=flags.quantize,
        compile=flags.compile,
    )
