"""Runs a script's `main` with the flags of the command line, as the examples do.

Fire parses, as in Meta's examples. Knows no verb.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from llama.commands.run import run_command

Functions = Callable[..., object] | dict[str, Callable[..., object]]


def run_script(main: Functions, name: str | None = None) -> None:
    """Call `main` with the flags of the command line, and end as a command does.

    A flag `--max_gen_len` (or `--max-gen-len`) becomes the argument `max_gen_len`. An unknown flag
    is reported before `main` is called. A user's mistake (ValueError, OSError, ...) is one line on
    stderr and exit code 2, Ctrl-C exit code 130.

    Args:
        main: its parameters are the flags; those annotated as `str` are not parsed as Python
            literals. Or several functions by name, of which the first argument chooses one.
        name: of the script in messages; None is the name of its file.
    """
    name = name or Path(sys.argv[0]).name
    run_command(lambda: _parse(main, name)(), name)


def _parse(main: Functions, name: str) -> Callable[[], object]:
    """The call that the command line asks for.

    Raises:
        ValueError: the flags do not fit.
        SystemExit: help was asked for, and has been printed.
    """
    import fire

    calls: list[Callable[[], object]] = []
    functions = main if isinstance(main, dict) else {"": main}
    recorders = {verb: _recorder(function, calls) for verb, function in functions.items()}
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):
            fire.Fire(recorders if isinstance(main, dict) else recorders[""], name=name)
    except fire.core.FireExit as e:
        if e.code:
            reason = e.trace.elements[-1].ErrorAsStr()
            raise ValueError(f"{reason}; --help lists the flags") from None
        print(output.getvalue(), end="", file=sys.stderr)
        raise SystemExit(0) from None
    return calls[0] if calls else lambda: None


def _recorder(
    function: Callable[..., object], calls: list[Callable[[], object]]
) -> Callable[..., None]:
    """A function with the same parameters that only stores the call.

    Fire calls a function before it looks at the flags that are left over.
    """
    from fire.decorators import SetParseFns

    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> None:
        calls.append(partial(function, *args, **kwargs))

    hints = {name: str(p.annotation) for name, p in inspect.signature(function).parameters.items()}
    texts = {name: str for name, hint in hints.items() if "str" in hint}
    if "--help" in sys.argv:  # which would list SetParseFns' data as a command
        return record
    recorder: Callable[..., None] = SetParseFns(**texts)(record)
    return recorder
