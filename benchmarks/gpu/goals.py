"""Whether a result of `benchmarks.gpu` reaches the goals. Measures nothing."""

from __future__ import annotations

from collections.abc import Mapping

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
    lines += finetuning_goals(found)
    failed = found.get(("pytest tests/cuda", "failed"))
    known = "not measured" if failed is None else f"{failed:.0f} failed"
    return [*lines, f"goal: no test marked cuda fails: {known}"]


def finetuning_goals(found: Mapping[tuple[str, str], float]) -> list[str]:
    """Those of LoRA: beside peft, and in memory."""

    def of(begin: str, column: str) -> float | None:
        values = (v for (row, name), v in found.items() if row.startswith(begin) and name == column)
        return next(values, None)

    def ratio(column: str) -> float | None:
        ours, theirs = (of(f"{name}, LoRA, packed", column) for name in ("llama3", "peft"))
        return ours / theirs if ours and theirs else None

    return [
        line("packed LoRA / peft, speed", 1.0, ratio("training")),
        line("packed LoRA / peft, memory", 0.8, ratio("peak memory"), most=True),
        line("int4 LoRA, GiB", 10.0, of("llama3, int4 LoRA", "peak memory"), most=True),
    ]


def line(what: str, goal: float, value: float | None, most: bool = False) -> str:
    """A goal. `most`: the value must not be above it, instead of below."""
    text = f"goal: {what}: {'at most ' * most}{goal}"
    if value is None:
        return f"{text}: not measured"
    reached = value <= goal if most else value >= goal
    return f"{text}: {value:.3f}, {'reached' if reached else 'not reached'}"
