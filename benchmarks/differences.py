"""Compare two results of the same benchmark, figure by figure.

    python -m benchmarks.differences OLD.json NEW.json --tolerance 0.03

Prints the ratio of the medians of each figure. The exit code is 1 if a ratio is further from 1 than
the tolerance, in either direction, or if a figure is in one file only; else 0. Results of different
machines cannot be compared this way; `benchmarks.checkouts` measures two versions in one run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import Result, load_result, number
from benchmarks.script import run_benchmark

TOLERANCE = 0.03
Key = tuple[str, str]  # a figure's row and column


def compare(old: Result, new: Result, tolerance: float) -> tuple[list[list[str]], int]:
    """Returns (the table's rows: row, column, old, new, ratio, verdict; how many are flagged)."""
    before, after = figures(old), figures(new)
    rows, flagged = [], 0
    for key in dict.fromkeys([*before, *after]):
        values = [found[key]["median"] if key in found else None for found in (before, after)]
        either = before.get(key) or after[key]
        ratio, verdict = judge(values, either.get("better"), tolerance)
        flagged += bool(verdict)
        unit = f" {either['unit']}" if either["unit"] else ""
        cells = ["-" if value is None else number(value) + unit for value in values]
        rows.append([*key, *cells, ratio, verdict])
    return rows, flagged


def figures(result: Result) -> dict[Key, dict[str, Any]]:
    """{(row, column): figure}, without those whose median is not known."""
    found = {(figure["row"], figure["column"]): figure for figure in result["figures"]}
    return {key: figure for key, figure in found.items() if figure["median"] is not None}


def judge(values: list[Any], better: str | None, tolerance: float) -> tuple[str, str]:
    """The ratio new / old, and "" if it is within the tolerance, else what is wrong with it."""
    old, new = values
    if old is None or new is None:
        return "-", "only in new" if old is None else "only in old"
    if old == new:
        return "1.000", ""
    if not old:
        return "-", "differs"
    ratio = float(new) / float(old)
    if abs(ratio - 1) <= tolerance:
        return f"{ratio:.3f}", ""
    if better is None:
        return f"{ratio:.3f}", "differs"
    return f"{ratio:.3f}", "better" if (ratio > 1) == (better == "higher") else "worse"


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of text with padded columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def differences(old: Result, new: Result) -> list[str]:
    """Known differences of machine and versions, which may explain those of the figures."""
    lines = []
    for part in ("machine", "versions"):
        for key in sorted({*old[part], *new[part]} - {"read_GB_s"}):
            before, after = old[part].get(key), new[part].get(key)
            if before != after and before is not None and after is not None:
                lines.append(f"{part}, {key}: {before} in old, {after} in new")
    return lines


def main(old: str, new: str, tolerance: float = TOLERANCE) -> None:
    """Print the table.

    Args:
        old: the file of the result to compare with.
        new: the file of the other result.
        tolerance: largest difference of a ratio from 1 that is not flagged.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or tolerance < 0:
        raise ValueError(f"--tolerance must be a number, 0 or more, not {tolerance!r}")
    before, after = load_result(Path(old)), load_result(Path(new))
    rows, flagged = compare(before, after, tolerance)
    heading = ["row", "column", "old", "new", "new / old", ""]
    print("\n".join([*differences(before, after), *aligned([heading, *rows])]))
    if flagged:
        print(f"{flagged} of {len(rows)} figures differ by more than {tolerance:g}")
        raise SystemExit(1)


if __name__ == "__main__":
    run_benchmark(main, "differences")
