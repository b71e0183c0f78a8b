"""`llama3 explain`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from llama.commands.model import CheckpointFlags, open_model
from llama.commands.options import Only
from llama.commands.terminal import print_remark, print_report
from llama.distributed import job
from llama.engine.sampling import Sampling
from llama.explain.compute import MAX_TOKENS, ONE_RANK, check_max_tokens
from llama.explain.trace import check_output
from llama.generation import BuildOptions
from llama.tokenizer import Message


def explain(
    prompt: Annotated[str, "the text to explain, quoted"],
    *,
    out: Annotated[str | None, "an HTML file to write the whole page to"] = None,
    force: Annotated[bool, "replace OUT if it exists"] = False,
    chat: Annotated[bool, "take PROMPT as a user's message, in the chat format"] = False,
    max_tokens: Annotated[
        int, "of a longer prompt, only the first so many tokens are explained"
    ] = MAX_TOKENS,
    sampling: Annotated[Sampling, Only("temperature", "top_p", "top_k", "min_p")],
    checkpoint: CheckpointFlags,
    build: Annotated[BuildOptions, Only("quantize", "device", "dtype", "adapter")],
) -> None:
    """Show what a model computes for a text, from its tokens to the next one.

    Prints a short text. The page (--out) also shows attention, the logit lens at all positions,
    rotary angles and the KV cache; it is one file for any browser and loads nothing.

    Examples:
        llama3 explain "The capital of France is"
        llama3 explain "The capital of France is" --out report.html
        llama3 explain "Why is the sky blue?" --chat -m Llama-3.2-1B-Instruct --top_k 40
    """
    if job.environment().world > 1:
        raise ValueError(ONE_RANK)
    check_max_tokens(max_tokens)
    path = None if out is None else page_path(out, force)
    with open_model(checkpoint, replace(build, max_seq_len=max_tokens)) as llama:
        if chat and llama.formatter is None:
            raise ValueError(
                "--chat needs a chat format, and this checkpoint has none; omit --chat"
            )
        message: Message = {"role": "user", "content": prompt}
        trace = llama.explain(
            [message] if chat else prompt,
            max_tokens=max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            name=name_of(checkpoint),
        )
    trace = replace(trace, limit=trace.limit.replace("max_tokens", "--max_tokens"))
    print_report(trace)
    if path is None:
        print_remark("--out report.html writes the whole page")
    else:
        trace.save(path, force, "--force")
        print_remark(f"page written to {path}")


def page_path(out: str, force: bool) -> Path:
    """Where the page will be; raises unless it can be written."""
    if out == "-":
        raise ValueError("--out writes a file, not standard output; give a name like report.html")
    return check_output(out, force, "--force")


def name_of(checkpoint: CheckpointFlags) -> str:
    """Of the folder or the repository."""
    if checkpoint.ckpt_dir is None:
        return checkpoint.hf or "the demo model"
    path = Path(checkpoint.ckpt_dir).resolve()
    return path.name or str(path)
