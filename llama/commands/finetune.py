"""`llama3 finetune`."""

from __future__ import annotations

from typing import Annotated

from llama.commands.model import CheckpointFlags
from llama.commands.options import Only
from llama.train.finetune_settings import FinetuneSettings


def finetune(
    *,
    checkpoint: Annotated[CheckpointFlags, Only("ckpt_dir", "tokenizer_path")],
    data: Annotated[list[str], "a file of samples (JSON, JSON lines, text); may be repeated"],
    out: Annotated[str | None, "the folder that becomes the adapter, or the checkpoint"] = None,
    show: Annotated[int, "print so many rows with what is trained marked, and end"] = 0,
    resume: Annotated[bool, "go on with what an interrupted run left in OUT"] = False,
    tensorboard: Annotated[bool, "also write OUT/train/tensorboard"] = False,
    device: Annotated[
        str | None, "auto, cpu, cuda, cuda:1, mps, ...; by default (auto) the fastest one there is"
    ] = None,
    settings: FinetuneSettings,
) -> None:
    """Train a checkpoint further, on instructions, dialogs or text: an adapter, or all weights.

    Ctrl-C saves and ends; the same command with --resume goes on. The exit code is then 130.

    Examples:
        llama3 finetune --data dialogs.jsonl --show 2
        llama3 finetune -m Llama-3.2-1B-Instruct --data dialogs.jsonl --out my-adapter --pack
        llama3 finetune -m Meta-Llama-3-8B --data alpaca.json --out my-adapter --quantize int4
        llama3 finetune -m Llama-3.2-1B --data alpaca.json --out my-llama --method full
    """
    raise NotImplementedError
