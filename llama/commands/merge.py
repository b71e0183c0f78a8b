"""`llama3 merge`."""

from __future__ import annotations

from typing import Annotated

from llama.commands.checkpoints import CHECKPOINT
from llama.commands.model import check_local
from llama.commands.terminal import print_report


def merge(
    base: Annotated[str, CHECKPOINT],
    adapter: Annotated[str, "the folder of an adapter of BASE, as finetune and PEFT write it"],
    out: Annotated[str, "the folder to write"],
    *,
    to: Annotated[
        str | None, "meta (the official layout) or hf (Hugging Face); by default as BASE"
    ] = None,
    dtype: Annotated[
        str | None, "auto, bf16, fp16 or fp32; by default (auto) what BASE has (bf16 from a GGUF)"
    ] = None,
    force: Annotated[bool, "replace OUT if it exists"] = False,
) -> None:
    """Write a checkpoint with an adapter merged into it.

    Examples:
        llama3 merge Meta-Llama-3-8B my-adapter my-model
        llama3 merge Meta-Llama-3-8B my-adapter my-model-hf --to hf
    """
    from llama.checkpoints.merge import merge as merge_adapter

    check_local(base)
    print_report(merge_adapter(base, adapter, out, to=to, dtype=dtype, force=force))
