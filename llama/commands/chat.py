"""`llama3 chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

from llama.checkpoints.demo_model import cache_dir
from llama.commands.chat_session import SETTINGS, ChatSession, follow
from llama.commands.line_editor import typed_lines
from llama.commands.model import BuildFlags, CheckpointFlags, open_model
from llama.commands.terminal import piped_lines
from llama.distributed import job, tensor_parallel
from llama.engine.checks import check_count
from llama.engine.sampling import Sampling

# The words that may follow a command, for completion; None is a path.
COMPLETIONS: dict[str, list[str] | None] = {
    "/help": [],
    "/system": [],
    "/set": SETTINGS,
    "/show": [],
    "/regenerate": [],
    "/undo": [],
    "/reset": [],
    "/save": None,
    "/load": None,
    "/quit": [],
}


def chat(
    *,
    system: Annotated[str | None, "a system message: how the model should behave"] = None,
    max_gen_len: Annotated[int | None, "most tokens of an answer; by default all that fit"] = None,
    sampling: Sampling,
    checkpoint: CheckpointFlags,
    build: BuildFlags,
) -> None:
    """Chat with an instruct model.

    /help lists the commands. Over a pipe each line is a message, or a command if it begins with /.

    Examples:
        llama3 chat
        llama3 chat -m Meta-Llama-3-8B-Instruct --system "Answer in one sentence."
        llama3 chat --hf meta-llama/Llama-3.2-1B-Instruct
        echo "What is the capital of France?" | llama3 chat --temperature 0
    """
    lines = _lines() if job.is_leader() else iter(())  # fails before a long load
    if max_gen_len is not None:
        check_count("--max_gen_len", max_gen_len)
    llama = open_model(checkpoint, build)
    if not job.is_leader():
        follow(llama)
        return
    terminal = sys.stdin.isatty()
    interactive = terminal and tensor_parallel.size() == 1
    options = asdict(sampling) | {"max_gen_len": max_gen_len}
    answered_all = ChatSession(llama, options, system, interactive).run(lines)
    tensor_parallel.broadcast_json(None)  # ends `follow` on the other ranks
    if not answered_all and not terminal:
        raise SystemExit(1)


def _lines() -> Iterator[str | ValueError]:
    if not sys.stdin.isatty():
        return piped_lines()
    stopped = "the job" if job.is_launched() else "an answer"
    hint = f"/help lists commands, Ctrl-C stops {stopped}, Ctrl-D ends"
    return typed_lines(COMPLETIONS, cache_dir() / "chat_history", hint)
