"""Loads lm-eval's tasks, runs them on a `Llama`, and reports. Needs the package lm-eval."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jinja2
import lm_eval
import yaml  # type: ignore[import-untyped]
from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from llama.common.files import replacing_file
from llama.distributed import job

OFFLINE = "docs/evaluation.md shows a task file that reads a JSON file and needs no network"
FEWSHOT_SEED = 1234  # lm-eval's default
HEADER = ("task", "metric", "value", "error", "questions", "few-shot")


def load_tasks(names: Sequence[str]) -> dict[str, Any]:
    """Tasks and groups of tasks, with their data, as lm-eval's TaskManager loads them.

    Args:
        names: task files (YAML), or names of tasks, groups or tags that come with lm-eval. A name
            may hold * and ?.

    Raises:
        FileNotFoundError: no such task file, or no such file of data.
        ValueError: no name, an unknown one, or a task file is wrong.
        ConnectionError: the data must be downloaded, and cannot be.
    """
    if not names:
        raise ValueError("no task is named; give a task file or a name of lm-eval")
    files = [name for name in names if is_file(name)]
    for name in files:
        if not Path(name).is_file():
            raise FileNotFoundError(f"there is no task file {name}; check the path")
    manager = TaskManager(include_defaults=len(files) < len(names))
    found: dict[str, None] = {}
    for name in names:
        with explained(name):
            matches = [name] if is_file(name) else manager.match_tasks([name])
            if not matches:
                raise ValueError(unknown(name, manager.all_tasks))
            found |= dict.fromkeys(matches)
    items: list[Any] = []
    for name in found:
        with explained(name):
            loaded: dict[str, Any] = manager.load([name])
            if not loaded["tasks"]:
                raise ValueError("it has no `task:` or `group:`; name one")
            members = {child for children in loaded["group_map"].values() for child in children}
            every = {**loaded["groups"], **loaded["tasks"]}
            items += [item for other, item in every.items() if other not in members]
    with explained(", ".join(names)):
        loaded = manager.load(items)
    return loaded


def is_file(name: str) -> bool:
    """Whether it names a task file, and not a task."""
    return name.endswith((".yaml", ".yml")) or "/" in name


def unknown(name: str, known: Sequence[str]) -> str:
    """What to say about a name that lm-eval does not know."""
    close = get_close_matches(name, known, 3)
    hint = (
        f"did you mean {' or '.join(close)}" if close else "did you mean one of `lm-eval ls tasks`"
    )
    return f"lm-eval has no task {name!r}; {hint}, or a task file of yours, {name}.yaml?"


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn what lm-eval and datasets raise into errors that say what to do.

    Args:
        what: the tasks.
    """
    try:
        yield
    except (ConnectionError, TimeoutError) as e:
        raise ConnectionError(
            f"{what}: the data cannot be downloaded ({first_line(e)}); connect to the network "
            f"once, they are kept afterwards; {OFFLINE}"
        ) from None
    except FileNotFoundError as e:
        raise FileNotFoundError(
            f"{what}: {first_line(e)}; relative data_files are looked for in the current folder. "
            f"A name of the hub needs the network; {OFFLINE}"
        ) from None
    except ValueError as e:
        raise e if what in str(e) else ValueError(f"{what}: {e}") from e
    except DatasetsError as e:
        cause = e.__cause__ if isinstance(e.__cause__, Exception) else e
        raise ValueError(f"{what}: its data cannot be read: {first_line(cause)}") from None
    except (KeyError, AssertionError, TypeError, yaml.YAMLError, jinja2.TemplateError) as e:
        reason = f"there is no {e}" if isinstance(e, KeyError) else first_line(e)
        raise ValueError(f"{what}: {reason}; correct the task file ({OFFLINE})") from e


def first_line(error: Exception) -> str:
    """The beginning of an error's text."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0].rstrip(".")


def evaluate(
    lm: Any, loaded: dict[str, Any], num_fewshot: int | None = None, **options: Any
) -> dict[str, Any] | None:
    """lm-eval's results; None on ranks other than the first of a machine.

    As `lm_eval.simple_evaluate`, without its description of the machine.

    Args:
        lm: a model of lm-eval.
        loaded: of `load_tasks`.
        num_fewshot: replaces what tasks say, but 0; None: what they say.
        options: of `lm_eval.evaluate`, such as limit and apply_chat_template.

    Raises:
        ValueError: a task does not fit its data.
    """
    random.seed(FEWSHOT_SEED)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            own = num_fewshot
        task.set_config(key="num_fewshot", value=own or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    with explained(", ".join(loaded["tasks"])):
        results: dict[str, Any] | None = lm_eval.evaluate(
            lm=lm, task_dict=loaded, fewshot_as_multiturn=True, **options
        )
    return results if job.local_rank() == 0 else None


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Results as JSON."""
    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
    with replacing_file(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")


def table(results: Mapping[str, Any]) -> str:
    """Results as lines of text with aligned columns."""
    rows = [HEADER, *result_rows(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    lines = []
    for row in rows:
        texts, numbers = row[:2], row[2:]
        cells = [text.ljust(width) for text, width in zip(texts, widths, strict=False)]
        cells += [text.rjust(width) for text, width in zip(numbers, widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def result_rows(results: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for each metric of each task and group."""
    for task, values in results["results"].items():
        counts = results.get("n-samples", {}).get(task, {})
        shots = results.get("n-shot", {}).get(task, "")
        better = results.get("higher_is_better", {}).get(task, {})
        name = values.get("alias", task)
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            arrow = {True: " (higher is better)", False: " (lower is better)"}
            metric_name = metric if kind == "none" else f"{metric} ({kind})"
            yield (
                str(name),
                metric_name + arrow.get(better.get(metric), ""),
                f"{value:.4f}",
                error_of(values.get(f"{metric}_stderr,{kind}")),
                str(counts.get("effective", "")),
                str(shots),
            )


def error_of(value: object) -> str:
    """A standard error, if there is one."""
    known = isinstance(value, (int, float)) and math.isfinite(value)
    return f"{value:.4f}" if known else ""
