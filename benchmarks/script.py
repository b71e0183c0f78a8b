"""How a benchmark becomes a command line."""

from __future__ import annotations

from typing import Any

from llama import run_script


def run_benchmark(function: Any, name: str) -> None:
    """Run a function, or one of a dictionary of functions, with the flags of the command line.

    A user's mistake is one line on stderr and exit code 2.
    """
    run_script(function, f"benchmarks.{name}")
