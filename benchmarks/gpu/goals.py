"""Whether a result of `benchmarks.gpu` reaches the goals. Measures nothing."""

from __future__ import annotations

from benchmarks.report import Result

BF16 = "bf16 compiled, batch 1, context 128"
INT4 = "int4 compiled, batch 1, context 128"


def goals(result: Result) -> list[str]:
    """A line for each goal: what it is, what was measured, whether that is enough."""
    found = {(f["row"], f["column"]): f["median"] for f in result["figures"]}
    bf16, int4 = (found.get((row, "engine step")) for row in (BF16, INT4))
    prefill = [
        value
        for (row, column), value in found.items()
        if row.startswith("bf16, 4096 tokens") and column == "of matmul"
    ]
    measured = [
        ("a compiled bf16 step, of copying", 0.80, found.get((BF16, "engine step, of copy"))),
        ("int4 / bf16, compiled", 2.2, int4 / bf16 if int4 and bf16 else None),
        ("bf16 prefill of 4,096, of matmul", 0.55, max(prefill, default=None)),
    ]
    lines = [line(*each) for each in measured]
    failed = found.get(("pytest tests/cuda", "failed"))
    known = "not measured" if failed is None else f"{failed:.0f} failed"
    return [*lines, f"goal: no test marked cuda fails: {known}"]


def line(what: str, goal: float, value: float | None) -> str:
    if value is None:
        return f"goal: {what}: {goal}: not measured"
    return f"goal: {what}: {goal}: {value:.3f}, {'reached' if value >= goal else 'not reached'}"
