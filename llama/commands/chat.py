"""`llama3 chat`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

from llama.commands.chat_session import ChatSession, follow
from llama.commands.model import BuildFlags, CheckpointFlags, open_model
from llama.commands.terminal import read_lines
from llama.distributed import job, tensor_parallel
from llama.engine.request import check_count
from llama.engine.sampling import Sampling


def chat(
    *,
    system: Annotated[str | None, "a system message: how the model should behave"] = None,
    max_gen_len: Annotated[int | None, "most tokens of an answer; by default all that fit"] = None,
    sampling: Sampling,
    checkpoint: CheckpointFlags,
    build: BuildFlags,
) -> None:
    """Chat with an instruct model.

    In a terminal, /help lists commands. Otherwise each line of standard input is a message.

    Examples:
        llama3 chat
        llama3 chat --ckpt_dir Meta-Llama-3-8B-Instruct --system "Answer in one sentence."
        echo "What is the capital of France?" | llama3 chat --temperature 0
    """
    lines = read_lines() if job.is_leader() else iter(())  # fails before a long load
    if max_gen_len is not None:
        check_count("--max_gen_len", max_gen_len)
    llama = open_model(checkpoint, build)
    options = asdict(sampling) | {"max_gen_len": max_gen_len}
    if not job.is_leader():
        follow(llama, options)
        return
    terminal = sys.stdin.isatty()
    interactive = terminal and tensor_parallel.size() == 1
    answered_all = ChatSession(llama, options, system, interactive).run(lines)
    tensor_parallel.broadcast_json(None)  # ends `follow` on the other ranks
    if not answered_all and not terminal:
        raise SystemExit(1)
