"""Results of a benchmark: figures, the machine, and the JSON file that keeps both.

A result is a JSON object:

    name        the benchmark and what it measured
    command     the command line; null if not recorded
    date        YYYY-MM-DD, or with HH:MM
    machine     processor, cores, flags, memory_GiB, read_GB_s, ...; null where unknown
    versions    of the packages that matter, by their names on PyPI
    settings    the benchmark's arguments
    figures     [{row, column, unit, better, runs, median}]
    transcribed true if it was copied from an earlier report: no more is known than it says

Optional in transcribed files: `range` [lowest, highest] of a figure whose runs are not known, and
`notes`, lines of text. Measures nothing and knows no benchmark.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

# Instruction sets that the kernels of this library, torch or llama.cpp choose between.
CPU_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx_vnni",
    "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve",
)  # fmt: skip
PACKAGES = ("llama3", "torch", "transformers", "peft", "llama-cpp-python", "llama-models")
Result = dict[str, Any]
Better = Literal["higher", "lower"] | None


@dataclass(frozen=True)
class Figure:
    """One measured quantity, named by its place in the table.

    Attributes:
        unit: "" for a plain number.
        runs: each run's value; at least one.
        better: which direction is an improvement; None if neither is.
    """

    row: str
    column: str
    unit: str
    runs: Sequence[float]
    better: Better = field(default=None, kw_only=True)

    @property
    def median(self) -> float:
        return statistics.median(self.runs)


def machine(read_GB_s: float | None = None) -> dict[str, Any]:
    """Describe the machine.

    Args:
        read_GB_s: bandwidth of reading memory, if the benchmark measured it.
    """
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (li.partition(":") for li in lines)}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS
    return {
        "processor": fields.get("model name") or platform.processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "memory_GiB": memory_gib(),
        "read_GB_s": read_GB_s,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
    }


def memory_gib() -> float | None:
    """Physical memory, or None if the system does not report it."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def versions() -> dict[str, str]:
    """Python's version, and those of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    found["torch"] = torch.__version__  # names the build, too
    return found


def make_result(
    name: str,
    settings: Mapping[str, Any],
    figures: Sequence[Figure],
    read_GB_s: float | None = None,
    **more: Any,
) -> Result:
    """A result measured here and now, by `python -m benchmarks.NAME` (the first word of `name`)."""
    module = "benchmarks." + name.replace(",", " ").split()[0]
    return {
        "name": name,
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine(read_GB_s),
        "versions": versions(),
        "settings": dict(settings),
        **more,
        "figures": [
            asdict(figure) | {"runs": list(figure.runs), "median": figure.median}
            for figure in figures
        ],
    }


def finish(result: Result, out: str | None, show_table: bool = True) -> None:
    """Print the table and then the result as one line of JSON; write `out`, if a file is named."""
    if show_table:
        print("\n".join(table([result])))
    print(json.dumps(result), flush=True)
    if out is not None:
        save(result, Path(out))


def save(result: Result, path: Path) -> None:
    """Write a result's file, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(dumps(result), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def dumps(result: Result) -> str:
    """Indented JSON, a figure on each line."""
    figures = result["figures"]
    head = json.dumps({**result, "figures": []}, indent=2, ensure_ascii=False)
    lines = ",\n".join(f"    {json.dumps(figure, ensure_ascii=False)}" for figure in figures)
    before, empty, after = head.rpartition('"figures": []')
    assert empty, "figures are the last key of a result"
    return f'{before}"figures": [\n{lines}\n  ]{after}\n'


def load_result(path: Path) -> Result:
    """Read a result's file. Fractions are Decimals, so that a table shows them as written.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a result.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no result at {path}; give a file that --out has written")
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)
        for figure in result["figures"]:
            figure["row"], figure["column"], figure["unit"], figure["median"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a result that --out has written") from None
    return result


def table(results: Sequence[Result]) -> list[str]:
    """Lines of a Markdown table, padded to be read as text too.

    A row for each row of the results' figures, a column for each column. Several results stand
    below each other, with their titles in the first column. Where all figures of a column have
    the same unit, the heading shows it; else each cell does.
    """
    figures = [figure for result in results for figure in result["figures"]]
    columns = list(dict.fromkeys(figure["column"] for figure in figures))
    units = {column: {f["unit"] for f in figures if f["column"] == column} for column in columns}
    shared = {column: found.pop() for column, found in units.items() if len(found) == 1}
    headings = [f"{c}, {shared[c]}" if shared.get(c) else c for c in columns]
    cells = [["run"] * (len(results) > 1) + [results[0].get("row_heading", ""), *headings]]
    for result in results:
        own = {(figure["row"], figure["column"]): figure for figure in result["figures"]}
        label = title(result)
        for row in dict.fromkeys(figure["row"] for figure in result["figures"]):
            found = [cell(own.get((row, column)), column not in shared) for column in columns]
            cells.append([label] * (len(results) > 1) + [row, *found])
            label = ""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(text.ljust(n) for text, n in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]


def title(result: Result) -> str:
    """A result's name, with the bandwidth of reading memory in its run."""
    bandwidth = result["machine"].get("read_GB_s")
    name: str = result["name"]
    return name if bandwidth is None else f"{name} (reading {number(bandwidth)} GB/s)"


def cell(figure: Mapping[str, Any] | None, with_unit: bool) -> str:
    """The median of three runs or more; fewer runs each; or the range."""
    if figure is None:
        return ""
    unit = f" {figure['unit']}" if with_unit and figure["unit"] else ""
    if figure.get("range"):
        low, high = map(number, figure["range"])
        return f"{low} to {high}{unit}"
    runs = figure["runs"] or []
    values = runs if len(runs) == 2 else [figure["median"]]
    return ", ".join(number(value) + unit for value in values)


def number(value: float | Decimal) -> str:
    """Unchanged if it has at most six characters, else rounded to four significant digits."""
    text = str(value)
    if len(text) <= 6:
        return text
    rounded = float(value)
    return f"{rounded:.0f}" if abs(rounded) >= 1e4 else f"{rounded:.4g}"
