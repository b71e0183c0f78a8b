"""`llama3 eval`."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from llama.commands.model import BuildFlags, CheckpointFlags, open_model
from llama.commands.terminal import print_remark, print_report
from llama.common.extras import install_line
from llama.common.files import check_writable
from llama.distributed import job
from llama.engine.checks import check_count


def eval(
    *,
    tasks: Annotated[
        list[str], "task files (YAML) or names of lm-eval's tasks, A,B; may be repeated"
    ],
    limit: Annotated[int | None, "only the first so many questions of each task"] = None,
    num_fewshot: Annotated[
        int | None, "solved examples before each question; by default as the task says"
    ] = None,
    apply_chat_template: Annotated[bool, "ask in the checkpoint's chat format"] = False,
    system: Annotated[str | None, "a system message before each question"] = None,
    out: Annotated[str | None, "a JSON file to write the results to"] = None,
    log_samples: Annotated[bool, "with --out, also each question and answer"] = False,
    max_batch_size: Annotated[int, "most rows computed at once"] = 8,
    checkpoint: CheckpointFlags,
    build: BuildFlags,
) -> None:
    """Measure a model on tasks of lm-eval.

    A task file may read its questions from a JSON file; docs/evaluation.md has one.

    Examples:
        llama3 eval --tasks my_task.yaml
        llama3 eval --tasks arc_easy,hellaswag --limit 200 -m Meta-Llama-3-8B --out results.json
        llama3 eval --tasks gsm8k --apply_chat_template -m Meta-Llama-3-8B-Instruct
    """
    names = [name.strip() for text in tasks for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError("--tasks names no task")
    for flag, value in (("--limit", limit), ("--num_fewshot", num_fewshot)):
        if value is not None and check_count(flag, value) == 0 and flag == "--limit":
            raise ValueError("--limit must be 1 or more, not 0")
    if log_samples and out is None:
        raise ValueError("--log_samples needs --out")
    if out is not None:
        check_writable(Path(out).absolute().parent)
    evaluation = _import_evaluation()
    loaded = evaluation.load_tasks(names)
    room = build.max_seq_len
    if room is not None:  # scoring also feeds the last token
        build = replace(build, max_seq_len=check_count("--max_seq_len", room) + 1)
    lm = evaluation.LlamaLM(open_model(checkpoint, replace(build, max_batch_size=max_batch_size)))
    results = evaluation.evaluate(
        lm,
        loaded,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        system_instruction=system,
        log_samples=log_samples,
    )
    if job.is_leader() and results is not None:
        print_report(evaluation.table(results))
        if out is not None:
            evaluation.write_results(Path(out), results)
            print_remark(f"results written to {out}")


def _import_evaluation() -> Any:
    """The module `llama.evaluation.tasks`. It imports lm-eval, which takes seconds."""
    quiet = not logging.getLogger("llama").isEnabledFor(logging.WARNING)
    if quiet or not sys.stderr.isatty():  # bars of lm-eval and datasets; read when imported
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from llama.evaluation import tasks
    except ImportError as e:
        raise ImportError(f"eval needs lm-eval ({e}); {install_line('eval')}") from None
    return tasks
