"""`llama3 eval`."""

from __future__ import annotations

import io
import logging
import os
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from llama.commands.model import BuildFlags, CheckpointFlags, open_model
from llama.commands.terminal import print_remark, print_report
from llama.common.extras import install_line
from llama.common.files import check_writable
from llama.distributed import job
from llama.engine.checks import check_count
from llama.generation import BuildOptions


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
        llama3 eval --tasks arc_easy,hellaswag --limit 200 -m Meta-Llama-3-8B --out r.json
        llama3 eval --tasks gsm8k --apply_chat_template -m Meta-Llama-3-8B-Instruct
    """
    names = [name.strip() for text in tasks for name in text.split(",") if name.strip()]
    for flag, value in (("--limit", limit), ("--num_fewshot", num_fewshot)):
        if value is not None and check_count(flag, value) == 0 and flag == "--limit":
            raise ValueError("--limit must be 1 or more, not 0")
    if log_samples and out is None:
        raise ValueError("--log_samples needs --out")
    if out is not None:
        check_writable(Path(out).absolute().parent)
    room = build.max_seq_len
    if room is not None:
        room = check_count("--max_seq_len", room) + 1  # scoring also feeds the last token
    build = replace(build, max_seq_len=room, max_batch_size=max_batch_size)
    options = {"limit": limit, "num_fewshot": num_fewshot, "system_instruction": system}
    options |= {"apply_chat_template": apply_chat_template, "log_samples": log_samples}
    with _quiet_if_asked():
        results = _results(names, checkpoint, build, options)
    if job.is_leader() and results is not None:
        _report(results, None if out is None else Path(out))


def _report(results: dict[str, Any], out: Path | None) -> None:
    from llama.evaluation.tasks import table, write_results

    print_report(table(results))
    if out is not None:
        write_results(out, results)
        print_remark(f"results written to {out}")


def _results(
    names: list[str], checkpoint: CheckpointFlags, build: BuildOptions, options: dict[str, Any]
) -> dict[str, Any] | None:
    """Load the tasks, then the model, and run it."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its remarks are for authors of tasks
    try:
        from llama.evaluation import LlamaLM
        from llama.evaluation import tasks as evaluation
    except ImportError as e:
        raise ImportError(f"eval needs lm-eval ({e}): {install_line('eval')}") from None
    loaded = evaluation.load_tasks(names)
    with open_model(checkpoint, build) as llama:
        return evaluation.evaluate(LlamaLM(llama), loaded, **options)


def _quiet_if_asked() -> AbstractContextManager[object]:
    """Drop what lm-eval writes to stderr, its bars, if --quiet is given."""
    quiet = not logging.getLogger("llama").isEnabledFor(logging.WARNING)
    return redirect_stderr(io.StringIO()) if quiet else nullcontext()
