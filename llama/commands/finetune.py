"""`llama3 finetune`."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any

from llama.checkpoints.demo_model import checkpoint_or_demo
from llama.commands.model import CheckpointFlags, check_local
from llama.commands.options import Only
from llama.commands.terminal import print_report
from llama.distributed import job
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
    """Train a checkpoint further, on instructions, dialogs or text.

    The result is an adapter (method lora) or a checkpoint. Ctrl-C saves and ends; the same command
    with --resume goes on. The exit code is then 130.

    Examples:
        llama3 finetune --data dialogs.jsonl --show 2
        llama3 finetune -m Llama-3.2-1B-Instruct --data chats.jsonl --out adapter --pack
        llama3 finetune -m Meta-Llama-3-8B --data alpaca.json --out adapter --quantize int4
        llama3 finetune -m Llama-3.2-1B --data alpaca.json --out my-llama --method full
    """
    if checkpoint.ckpt_dir is not None:
        check_local(checkpoint.ckpt_dir)
    base, tokenizer_path = checkpoint_or_demo(checkpoint.ckpt_dir, checkpoint.tokenizer_path)
    if show:
        from llama.train.finetuning import show_rows

        more: Any = {"tokenizer_path": tokenizer_path, "color": sys.stdout.isatty()}
        return print(show_rows(base, data, settings, show, **more))
    if out is None:
        raise ValueError("finetune needs --out: the folder that becomes the adapter or checkpoint")
    from llama.train.finetuning import finetune as run_training

    result = run_training(
        base,
        data,
        out,
        settings,
        tokenizer_path=tokenizer_path,
        resume=resume,
        tensorboard=tensorboard,
        device=device,
    )
    if job.is_leader():
        print_end(result, checkpoint.ckpt_dir, out, settings)
    if result.signal:
        raise SystemExit(128 + result.signal)


def print_end(result: Any, ckpt_dir: str | None, out: str, settings: FinetuneSettings) -> None:
    """Say how training ended, and what to do with the result."""
    if result.signal:
        print(f"stopped after step {result.step}; the same command with --resume goes on")
    if result.best_step:
        print_report(f"{out}: the result of step {result.best_step}, loss {result.best_loss:.4f}")
        if not result.signal:
            print_report(next_commands(ckpt_dir, out, settings))


def next_commands(ckpt_dir: str | None, out: str, settings: FinetuneSettings) -> str:
    """What to do with the result, as lines to type."""
    from llama.checkpoints.open import open_checkpoint, open_tokenizer

    result = shlex.quote(out)
    source = open_checkpoint(checkpoint_or_demo(ckpt_dir, None)[0])
    chats = open_tokenizer(source).chat_format is not None
    verb = "chat" if chats else 'complete "Once upon a time"'
    if not settings.adapts:
        return f"try it:\n  llama3 {verb} -m {result}\n  llama3 serve -m {result}"
    base = "" if ckpt_dir is None else f" -m {shlex.quote(ckpt_dir)}"
    quantize = "" if settings.quantize is None else f" --quantize {settings.quantize}"
    lines = [
        f"llama3 {verb}{base}{quantize} --adapter {result}",
        f"llama3 serve{base}{quantize} --adapter {result}",
    ]
    if settings.quantize is None and source.quantization is None:
        name = "$(llama3 demo)" if ckpt_dir is None else shlex.quote(ckpt_dir)
        lines.append(f"llama3 merge {name} {result} {result}-merged")
    return "\n  ".join(["try it:", *lines])
