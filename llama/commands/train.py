"""`llama3 train`."""

from __future__ import annotations

from typing import Annotated

from llama.commands.terminal import print_report
from llama.distributed import job
from llama.train.settings import Settings


def train(
    *,
    data: Annotated[str, "a text file, or a folder of .txt and .md files"],
    out: Annotated[str, "the folder that becomes the checkpoint"],
    resume: Annotated[bool, "go on with what an interrupted run left in OUT"] = False,
    tensorboard: Annotated[bool, "also write OUT/train/tensorboard"] = False,
    device: Annotated[
        str | None, "auto, cpu, cuda, cuda:1, mps, ...; by default (auto) the fastest one there is"
    ] = None,
    settings: Settings,
) -> None:
    """Train a model from nothing on a text.

    Ctrl-C saves and ends; the same command with --resume goes on. The exit code is then 130.

    Examples:
        llama3 train --data input.txt --out my-llama
        llama3 train --data input.txt --out my-llama --resume
        torchrun --nproc_per_node 2 -m llama train --data input.txt --out big --parallel ddp
    """
    from llama.train.pretraining import train as run_training

    result = run_training(
        data, out, settings, resume=resume, tensorboard=tensorboard, device=device
    )
    if job.is_leader():
        if result.signal:
            print(f"stopped after step {result.step}; the same command with --resume goes on")
        if result.best_step:
            print_report(
                f"{out}: the model of step {result.best_step}, loss {result.best_loss:.4f}"
            )
    if result.signal:
        raise SystemExit(128 + result.signal)
