"""Upper bounds of the speed of decoding, and of a server's requests a second. Runs no model.

A step takes as long as its memory or its arithmetic, whichever is longer (the roofline), and its
collectives, which the ranks wait for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llama.checkpoints.footprint import PREFILL_CHUNK, Footprint
from llama.checkpoints.hardware import Hardware

PAGE = 16  # tokens of a page of vLLM's cache, its default block size
WORTH = 1.2  # times as many requests a second that are worth an export


@dataclass(frozen=True)
class Time:
    """Seconds of a step of one rank, by what takes them. None: the hardware's figure is unknown."""

    memory: float | None
    compute: float | None
    collectives: float

    @property
    def total(self) -> float:
        return max(self.memory or 0.0, self.compute or 0.0) + self.collectives

    @property
    def limit(self) -> str:
        """What takes longest: "memory", "compute" or "collectives"."""
        times = {
            "memory": self.memory or 0.0,
            "compute": self.compute or 0.0,
            "collectives": self.collectives,
        }
        return max(times, key=times.__getitem__)


def decode_time(footprint: Footprint, hardware: Hardware, rows: int, filled: int) -> Time:
    """A decode step of `rows` rows, each with `filled` cached tokens."""
    return Time(
        _over(footprint.read(rows, filled), hardware.memory_bandwidth),
        _over(footprint.flops(rows, rows * filled, rows), hardware.compute),
        collective_time(footprint, hardware, rows * footprint.sent(), 1),
    )


def prefill_time(footprint: Footprint, hardware: Hardware, prompt: int) -> Time:
    """One prompt's share of prefill: a step of `PREFILL_CHUNK` positions may serve several."""
    steps = prompt / PREFILL_CHUNK
    pairs = prompt * (prompt + 1) // 2  # each position reads those before it, and itself
    return Time(
        _over(steps * footprint.read(0, 0), hardware.memory_bandwidth),
        _over(footprint.flops(prompt, pairs, 1), hardware.compute),
        collective_time(footprint, hardware, footprint.sent(prompt, 1), steps),
    )


def collective_time(footprint: Footprint, hardware: Hardware, sent: float, steps: float) -> float:
    """Seconds of the collectives of `steps` steps: latencies, and `sent` bytes over bandwidth."""
    transfer = _over(sent, hardware.interconnect) or 0.0
    return steps * footprint.collectives() * hardware.latency + transfer


def _over(amount: float, rate: float | None) -> float | None:
    return None if rate is None else amount / rate


def largest(fits: Callable[[int], bool]) -> int:
    """The largest n that fits, or 0. If n fits, all smaller numbers must fit."""
    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def serving(
    footprint: Footprint, hardware: Hardware, prompt: int, answer: int, context: int
) -> dict[str, Any]:
    """Figures of a server that is never without requests, all of the same lengths.

    As many rows as fit decode together. A request takes its share of prefill and answer - 1 shares
    of a decode step, in which the rows are filled to the mean, prompt + answer / 2. The same is
    computed for a cache of pages (vLLM), where a request occupies what it has filled, and not a row
    of `context` tokens.

    Raises:
        ValueError: a length is not positive, exceeds `context`, or the hardware is unknown.
    """
    _check(hardware, prompt, answer, context)
    memory, filled = hardware.memory or 0, prompt + answer // 2
    pages = math.ceil(filled / PAGE) * PAGE
    rows = largest(lambda n: footprint.needed(n, context) <= memory)
    paged_rows = largest(
        lambda n: footprint.needed(n, context) + footprint.cache(n, pages - context) <= memory
    )
    out: dict[str, Any] = {"prompt": prompt, "answer": answer, "rows": rows}
    if not rows:
        return out
    prefill = prefill_time(footprint, hardware, prompt)

    def rate(n: int) -> float:
        """Requests a second of n rows."""
        step = decode_time(footprint, hardware, n, filled)
        return 1 / (prefill.total + (answer - 1) * step.total / n)

    step = decode_time(footprint, hardware, rows, filled)
    gain = rate(paged_rows) / rate(rows)
    return out | {
        "prefill_seconds": prefill.total,
        "prefill_limit": prefill.limit,
        "step_seconds": step.total,
        "step_limit": step.limit,
        "requests_a_second": rate(rows),
        "tokens_a_second": answer * rate(rows),
        "seconds_a_request": rows / rate(rows),
        "paged_rows": paged_rows,
        "paged_requests_a_second": rate(paged_rows),
        "export_pays": gain >= WORTH,
    }


def _check(hardware: Hardware, prompt: int, answer: int, context: int) -> None:
    for name, value in (("prompt_tokens", prompt), ("answer_tokens", answer)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
    if prompt + answer > context:
        raise ValueError(
            f"{prompt} + {answer} tokens do not fit a row of {context}; give longer rows"
        )
    needs = {
        "device_memory": hardware.memory,
        "memory_bandwidth": hardware.memory_bandwidth,
        "compute": hardware.compute,
    }
    if missing := [f"--{name}" for name, value in needs.items() if value is None]:
        raise ValueError(f"requests a second need {', '.join(missing)}, or --gpu")


def as_lines(f: dict[str, Any], context: int) -> list[tuple[str, str]]:
    """The figures of `serving` as labels and texts."""
    lengths = f"{f['prompt']} prompt and {f['answer']} answer tokens"
    if not f["rows"]:
        return [("serving", f"{lengths}: no row of {context} tokens fits")]
    rate, paged = f["requests_a_second"], f["paged_requests_a_second"]
    prefill, step = f["prefill_seconds"] * 1e3, f["step_seconds"] * 1e3
    busy = f"{f['tokens_a_second']:.1f} tok/s; {f['seconds_a_request']:.2f} s a request"
    gain = f"{paged / rate:.2f} times as many"
    advice = "export to vLLM" if f["export_pays"] else "no reason to export"
    return [
        ("serving", f"{lengths}, {f['rows']} rows of {context} tokens, always busy"),
        ("  prefill", f"{prefill:.2f} ms a request, mostly {f['prefill_limit']}"),
        ("  decode step", f"{step:.2f} ms for all rows, mostly {f['step_limit']}"),
        ("  at most", f"{rate:.2f} requests/s, {busy}"),
        ("  with pages", f"{paged:.2f} requests/s in {f['paged_rows']} rows, {gain}: {advice}"),
    ]
