"""Runs parts one after the other, each in a process with a limit, and keeps their results.

The processes are forks of this one, which never touches the GPU: torch is imported once.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.goals import goals
from benchmarks.gpu.parts import Part
from benchmarks.gpu.record import Run, read_entries, reason
from benchmarks.gpu.sizes import REAL, REHEARSAL
from benchmarks.report import Result, make_result, save
from benchmarks.tables import tables_by_part

NO_GPU = "torch finds no GPU here; --rehearse runs the same parts with tiny shapes on the CPU"
SPARE = 2.0  # seconds kept for writing at the end
LEAST = 5.0  # seconds below which a part is not begun


def run_parts(parts: Sequence[Part], seconds: float, folder: Path, rehearse: bool) -> Result:
    """Run them within `seconds`; the result, which is also in `folder`/gpu.json.

    Raises:
        ValueError: no GPU, and no rehearsal; or the folder has results already.
        OSError: the folder cannot be written.
    """
    end = time.time() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "gpu.json").exists():
        raise ValueError(f"{folder} has results already; choose another folder for --out")
    describe = Part("machine", "benchmarks.gpu.runner:describe", 60)
    state, _ = run_part(describe, folder, time.time() + 60, rehearse)
    entries = read_entries(folder / "machine.jsonl")
    if not entries:
        raise ValueError(state["status"])
    if "note" not in entries[0]:
        raise ValueError(entries[0].get("failed", state["status"]))
    result: Result = entries[0]["note"]
    if result["machine"]["gpu"] is None and not rehearse:
        raise ValueError(NO_GPU)
    result |= {"parts": [], "notes": [], "figures": result.pop("figures")}
    for part in parts:
        limit = min(part.limit, end - SPARE - time.time())
        if limit < LEAST:
            state = {"name": part.name, "status": "failed: no time was left", "seconds": 0.0}
            entries = []
        else:
            state, entries = run_part(part, folder, time.time() + limit, rehearse)
        add(result, state, entries)
        save(result, folder / "gpu.json")
        print(f"{part.name}: {state['status']}, {state['seconds']} s", flush=True)
    return result


def add(result: Result, state: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    """Add what a part has measured."""
    name = state["name"]
    result["parts"].append(state)
    for entry in entries:
        if "figure" in entry:
            result["figures"].append(entry["figure"] | {"part": name})
        elif "failed" in entry:
            result["notes"].append(f"{name}: failed: {entry['failed']}")
        else:
            result["notes"].append(f"{name}: {entry['note']}")
    if state["status"].startswith("failed"):
        result["notes"].append(f"{name}: {state['status']}")


def run_part(
    part: Part, folder: Path, deadline: float, rehearse: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a part until it ends or the deadline comes: (how it ended, what it wrote)."""
    path, log = folder / f"{part.name}.jsonl", folder / f"{part.name}.log"
    path.unlink(missing_ok=True)
    start = time.time()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=work, args=(part, path, log, deadline, rehearse))
    process.start()
    assert process.pid is not None
    try:
        process.join(max(0.0, deadline - time.time()))
        timed_out = process.is_alive()
    finally:
        with suppress(ProcessLookupError, PermissionError):  # its children too, if any are left
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    entries = read_entries(path)
    status = "done"
    if timed_out:
        status = f"failed: timed out after {time.time() - start:.0f} s"
    elif process.exitcode != 0 and not any("failed" in entry for entry in entries):
        status = f"failed: ended with exit code {process.exitcode}: {last_line(log)}"
    elif failures := sum("failed" in entry for entry in entries):
        status = f"failed in {failures} place{'s' * (failures > 1)}"
    state = {"name": part.name, "status": status, "seconds": round(time.time() - start, 1)}
    return state, entries


def last_line(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it printed nothing"


def work(part: Part, path: Path, log: Path, deadline: float, rehearse: bool) -> None:
    """What the process of a part does."""
    os.setsid()  # a group of its own, to be ended with its children
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":  # a rehearsal: the compiled step's code, but no compiler
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    run = Run(path, device, REHEARSAL if rehearse else REAL, deadline)
    module, _, name = part.function.partition(":")
    code = 0
    try:
        getattr(importlib.import_module(module), name)(run, *part.arguments)
    except Exception as e:
        traceback.print_exc()
        run.failed("", reason(e))
        code = 1
    sys.stdout.flush()
    os._exit(code)  # no thread or handler may keep the process


def describe(run: Run) -> None:
    """Write the head of a result: command, date, machine, versions."""
    result = make_result("gpu", {"rehearsal": run.sizes.rehearsal}, [])
    result["command"] = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])
    if run.device.type == "cuda":
        versions, properties = result["versions"], torch.cuda.get_device_properties(0)
        versions["cuda"] = str(torch.version.cuda)
        with suppress(ImportError):
            versions["triton"] = importlib.import_module("triton").__version__
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem",
        ]
        with suppress(OSError, subprocess.SubprocessError, LookupError, ValueError):
            found = subprocess.run(
                [*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
            )
            driver, *limits = found.stdout.splitlines()[0].split(", ")
            versions["driver"] = driver
            result["machine"]["gpu_limits"] = ", ".join(limits)
        result["machine"]["gpu_memory_GiB"] = round(properties.total_memory / 2**30, 1)
        result["machine"]["gpus"] = torch.cuda.device_count()
    run._write(note=result)


def shown(result: Result) -> list[str]:
    """Tables of all figures, what failed, and how long each part took."""
    lines = tables_by_part([result])
    lines += ["", *result["notes"], ""]
    lines += [] if result["settings"]["rehearsal"] else [*goals(result), ""]
    return lines + [f"{p['name']}: {p['status']}, {p['seconds']} s" for p in result["parts"]]
