"""The outcome of each check of a suite, and the table of all suites."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """One check: `state` is passed, failed, skipped (by the suite itself) or deselected (by us)."""

    name: str
    state: str
    reason: str = ""


def matches(name: str, pattern: str) -> bool:
    """A pattern is a check's name, a test function's, a class's or a file's; `*` is anything."""
    wanted = ".*".join(map(re.escape, pattern.split("*")))
    return re.fullmatch(rf"{wanted}(\[.*|::.*)?", name, re.DOTALL) is not None


def read_results(path: Path) -> list[Result]:
    """Results that a suite wrote, one JSON object a line."""
    return [Result(**json.loads(line)) for line in path.read_text().splitlines() if line]


def deselect(results: Iterable[Result], deselected: Mapping[str, str]) -> list[Result]:
    """Mark failures that the list expects; a pattern that no failure needs is a failure itself.

    For suites that cannot leave out a check. Each expected failure keeps the list's reason.
    """
    marked, used = [], set()
    for result in results:
        pattern = next((p for p in deselected if matches(result.name, p)), None)
        if pattern is not None and result.state != "passed":
            used.add(pattern)
            result = Result(result.name, "deselected", deselected[pattern])
        marked.append(result)
    for pattern in deselected.keys() - used:
        marked.append(
            Result(pattern, "failed", "is in deselected.py, but does not fail: remove it")
        )
    return marked


def table(suites: Mapping[str, list[Result]]) -> str:
    """Suite, passed, failed, deselected, skipped."""
    states = ("passed", "failed", "deselected", "skipped")
    width = max(map(len, suites))
    lines = [f"{'suite':{width}}" + "".join(f"{state:>12}" for state in states)]
    for suite, results in suites.items():
        counts = [sum(r.state == state for r in results) for state in states]
        lines.append(f"{suite:{width}}" + "".join(f"{count:12}" for count in counts))
    return "\n".join(lines)
