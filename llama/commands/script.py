"""Runs a script's `main` with the flags of the command line, as the examples do.

Fire parses, as in Meta's examples. Knows no verb.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

from llama.commands.run import interrupt_at_once, raise_interrupts, run_command
from llama.commands.suggestions import unknown_flag

Functions = Callable[..., object] | dict[str, Callable[..., object]]
KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}


def run_script(main: Functions, name: str | None = None) -> None:
    """Call `main` with the flags of the command line, and end as a command does.

    A flag `--max_gen_len` (or `--max-gen-len`) becomes the argument `max_gen_len`. An unknown flag,
    or a value of another type than is declared, is reported before `main` is called. A user's
    mistake (ValueError, OSError, ...) is one line on stderr and exit code 2, Ctrl-C exit code 130.

    Args:
        main: its parameters are the flags; those annotated as `str` are not parsed as Python
            literals. Or several functions by name, of which the first argument chooses one.
        name: of the script in messages; None is the name of its file.
    """
    name = name or Path(sys.argv[0]).name
    interrupt_at_once(name)

    def call() -> None:
        found = _parse(main, name)
        raise_interrupts()
        found()

    run_command(call, name)


def _parse(main: Functions, name: str) -> Callable[[], object]:
    """The call that the command line asks for.

    Raises:
        ValueError: the flags do not fit.
        SystemExit: help was asked for, and has been printed.
    """
    import fire

    functions = main if isinstance(main, dict) else {"": main}
    words = sys.argv[1:]
    if {"--help", "-h"} & set(words):
        print(_help(functions.get(words[0], main), name))
        raise SystemExit(0)
    calls: list[Callable[[], object]] = []
    recorders = {verb: _recorder(function, calls) for verb, function in functions.items()}
    function = functions.get("") or functions.get(words[0] if words else "")
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            fire.Fire(recorders if isinstance(main, dict) else recorders[""], name=name)
    except fire.core.FireExit as e:
        if e.code or not calls:
            raise ValueError(_mistake(e, function)) from None
    if not calls:
        raise ValueError(f"name one of {', '.join(functions)}; --help lists the flags of each")
    return calls[0]


def _mistake(error: Any, function: Callable[..., object] | None) -> str:
    """What Fire did not understand, and what was probably meant."""
    reason = error.trace.elements[-1].ErrorAsStr() if error.code else ""
    known = [f"--{name}" for name in inspect.signature(function).parameters] if function else []
    if word := re.fullmatch("Could not consume arg: (.*)", reason, re.DOTALL):
        if not word[1].startswith("-"):
            return f"too many words: {word[1]!r}; --help lists the flags"
        flag = word[1].partition("=")[0]
        meant = unknown_flag(flag, known)
        ending = f". Did you mean {meant}?" if meant else "; --help lists the flags"
        return f"no flag {flag}{ending}"
    if missing := re.search(r"required arguments?: (.*)", reason):
        return f"--{missing[1]} is needed; --help explains it"
    return f"{reason or 'the flags do not fit'}; --help lists the flags"


def _recorder(
    function: Callable[..., object], calls: list[Callable[[], object]]
) -> Callable[..., None]:
    """A function with the same parameters that only stores the call.

    Fire calls a function before it looks at the flags that are left over.
    """
    from fire.decorators import SetParseFns

    hints = _hints(function)

    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> None:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
        calls.append(partial(_checked, function, given, hints))

    texts = {name: _text for name, kinds in hints.items() if str in kinds}
    recorder: Callable[..., None] = SetParseFns(**texts)(record)
    return recorder


def _text(value: str) -> str:
    return value


def _checked(
    function: Callable[..., object], given: Mapping[str, Any], hints: Mapping[str, tuple[Any, ...]]
) -> object:
    """Call a function after checking the types of its arguments.

    Raises:
        ValueError: a value is missing or has another type.
    """
    for name, value in given.items():
        kinds = hints.get(name, ())
        wanted = [kind for kind in kinds if kind in KINDS]
        if value == "True" and str in kinds and f"--{name}" in _flags_without_value():
            raise ValueError(f"--{name} needs a value: {KINDS[str]}")
        fits = type(value) in kinds or (type(value) is int and float in kinds)
        if wanted and not fits:
            words = " or ".join(KINDS[kind] for kind in wanted)
            got = "none" if value is True else repr(value)
            raise ValueError(f"--{name} needs {words}, not {got}")
    return function(**given)


def _flags_without_value() -> set[str]:
    """The flags of the command line that no value follows."""
    words = sys.argv[1:]
    ends = [*words[1:], "--"]
    pairs = zip(words, ends, strict=True)
    return {word.replace("-", "_").replace("__", "--", 1) for word, end in pairs if end[:2] == "--"}


def _hints(function: Callable[..., object]) -> dict[str, tuple[Any, ...]]:
    """{parameter: its types}, without those whose annotation is none or unknown."""
    try:
        hints = get_type_hints(function)
    except NameError:  # a name that is imported for types only
        return {}
    return {name: get_args(hint) or (hint,) for name, hint in hints.items() if name != "return"}


def _help(main: Functions, name: str) -> str:
    """The help text: what a function does, and each of its flags."""
    if isinstance(main, dict):
        verbs = [f"  {verb}  {_summary(function)}" for verb, function in main.items()]
        return "\n".join([f"Usage: {name} VERB [FLAGS]; VERB --help lists the flags", "", *verbs])
    text, _, explained = inspect.cleandoc(main.__doc__ or "").partition("\n\nArgs:\n")
    helps = {
        found[1]: " ".join(found[2].split())
        for found in re.finditer(r"^    (\w+): (.*?)(?=^    \w|^\S|\Z)", explained, re.M | re.S)
    }
    hints, rows = _hints(main), []
    for parameter in inspect.signature(main).parameters.values():
        kinds = [kind.__name__ for kind in hints.get(parameter.name, ()) if kind in KINDS]
        ends = f" [default: {parameter.default}]"
        if parameter.default in (None, False, parameter.empty):
            ends = " [required]" if parameter.default is parameter.empty else ""
        left = f"  --{parameter.name}" + (f" <{kinds[0]}>" if kinds and kinds[0] != "bool" else "")
        rows.append((left, helps.get(parameter.name, "") + ends))
    width = max((len(left) for left, _ in rows), default=0) + 2
    room = max(30, min(100, int(os.environ.get("COLUMNS", "80"))) - width)
    lines = [f"Usage: {name} [FLAGS]", "", text, "", "Flags:"]
    for left, right in rows:
        first, *more = textwrap.wrap(right.strip(), room) or [""]
        lines += [f"{left:<{width}}{first}".rstrip(), *(" " * width + line for line in more)]
    return "\n".join(lines)


def _summary(function: Callable[..., object]) -> str:
    return inspect.cleandoc(function.__doc__ or "").partition("\n")[0]
