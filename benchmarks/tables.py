"""Write the tables of docs/performance.md from benchmarks/results/*.json.

    python -m benchmarks.tables          # rewrite the page
    python -m benchmarks.tables --check  # exit code 1 if the page is not up to date

The page marks each table by two comments; the first names the results to show, without ".json":

    <!-- results: decode-1b-2026-11-22 decode-8b-2026-11-22 -->
    <!-- end of results -->

What is between them is generated: commands, machine, versions and date, the table, the notes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.report import Result, load_result, number, table
from benchmarks.script import run_benchmark

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
SECTION = re.compile(r"(<!-- results: ([^>]*?) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def rewrite(page: str, folder: Path = RESULTS) -> str:
    """The page with its marked sections generated anew.

    Raises:
        FileNotFoundError, ValueError: a result that the page names is missing or damaged.
    """

    def section(match: re.Match[str]) -> str:
        results = [load_result(folder / f"{name}.json") for name in match[2].split()]
        return match[1] + "\n".join(["", *lines(results), "", ""]) + match[3]

    return SECTION.sub(section, page)


def shown(page: str) -> set[str]:
    """Names of the results that the page shows."""
    return {name for match in SECTION.finditer(page) for name in match[2].split()}


def lines(results: Sequence[Result]) -> list[str]:
    """A section of the page."""
    commands = unique(results, lambda result: result["command"])
    notes = [f"- {note}" for result in results for note in result.get("notes", [])]
    text = [f"    {command}" for command in commands]
    text += [""] * bool(text) + ["; ".join(unique(results, circumstances)) + ".", ""]
    text += tables_by_part(results)
    return text + [""] * bool(notes) + notes


def tables_by_part(results: Sequence[Result]) -> list[str]:
    """A table; where figures have a "part" (`benchmarks.gpu`), a heading and a table for each."""
    figures = [figure for result in results for figure in result["figures"]]
    parts = list(dict.fromkeys(figure.get("part") for figure in figures))
    if parts in ([], [None]):
        return table(results) if figures else []
    text: list[str] = []
    for part in parts:
        text += [""] * bool(text) + [f"**{part}**"]
        own = [f for f in figures if f.get("part") == part]
        columns: dict[str, list[str]] = {}  # of each row
        for figure in own:
            columns.setdefault(figure["row"], []).append(figure["column"])
        for some in dict.fromkeys(map(tuple, columns.values())):  # a table for rows that are alike
            alike = [f for f in own if tuple(columns[f["row"]]) == some]
            text += ["", *table([{**results[0], "figures": alike}])]
    return text


def unique(results: Sequence[Result], what: Callable[[Result], str | None]) -> list[str]:
    """Values of the results, each once; those that are not known are left out."""
    return [value for value in dict.fromkeys(map(what, results)) if value is not None]


def circumstances(result: Result) -> str:
    """Machine, versions and date in words, as far as they are known."""
    machine, versions = result["machine"], result["versions"]
    parts = [machine.get("processor"), machine.get("gpu")]
    if machine.get("cores"):
        parts.append(f"{machine['cores']} core{'s' * (machine['cores'] > 1)}")
    if machine.get("flags"):
        parts.append("/".join(f for f in machine["flags"] if f.startswith(("avx512", "amx"))))
    if machine.get("threads"):
        parts.append(f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}")
    if machine.get("memory_GiB"):
        parts.append(f"{number(machine['memory_GiB'])} GiB")
    if machine.get("OMP_WAIT_POLICY"):
        parts.append(f"OMP_WAIT_POLICY={machine['OMP_WAIT_POLICY']}")
    parts += [
        f"{name} {version}"
        for name, version in versions.items()
        if name not in ("python", "llama3")
    ]
    return ", ".join([part for part in parts if part] + [result["date"][:10]])


def main(check: bool = False) -> None:
    """Rewrite docs/performance.md.

    Args:
        check: do not write; exit with code 1 if the page is not up to date.
    """
    before = PAGE.read_text(encoding="utf-8")
    after = rewrite(before)
    if check and before != after:
        print(f"{PAGE} is not up to date; run `python -m benchmarks.tables`")
        raise SystemExit(1)
    if not check:
        PAGE.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    run_benchmark(main, "tables")
