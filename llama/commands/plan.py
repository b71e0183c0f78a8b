"""`llama3 plan`."""

from __future__ import annotations

from typing import Annotated

from llama.checkpoints.plan import PlanOptions, as_text, make_plan
from llama.commands.terminal import print_json, print_report


def plan(
    *,
    options: PlanOptions,
    json: Annotated[bool, "print one JSON object"] = False,
) -> None:
    """Calculate the memory that each rank needs, what fits, the highest speed, requests a second.

    A rank is a process with a device of its own. Give --shape or --ckpt_dir.

    Examples:
        llama3 plan --shape 8b --device-memory 24GB --memory-bandwidth 1TB/s
        llama3 plan --shape 405b --ranks 16 --max_batch_size 8 --device-memory 80GB
        llama3 plan --ckpt_dir Meta-Llama-3-70B --ranks 4 --quantize int8
        llama3 plan --shape 8b --gpu h100 --prompt_tokens 1000 --answer_tokens 250
    """
    figures = make_plan(options)
    if json:
        print_json(figures)
    else:
        print_report(as_text(figures))
