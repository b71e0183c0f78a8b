"""How a benchmark becomes a command line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from llama.commands.run import run as run_script


def run_benchmark(function: Any, name: str) -> None:
    """Run a function, or one of a dictionary of functions, with the flags of the command line.

    A user's mistake is one line on stderr and exit code 2.
    """
    commands = SimpleNamespace(**function) if isinstance(function, dict) else function
    run_script(commands, f"benchmarks.{name}")
