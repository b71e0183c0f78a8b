"""A function, or an object's methods, as a command line. Knows no verb."""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
import traceback
from typing import Any

import fire

from llama.distributed import job, tensor_parallel

MISTAKES = (ValueError, TypeError, OSError, ImportError, RuntimeError, job.RankError)


def run(component: Any, name: str) -> None:
    """Run a function or an object's methods as a command line.

    A mistake is one line on stderr and exit code 2; Ctrl-C is exit code 130.
    """
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # closed by who started us
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115 - as long as the process
    signal.signal(signal.SIGTERM, _terminate)
    try:
        verb = [] if inspect.isfunction(component) else sys.argv[1:2]
        function = component if inspect.isfunction(component) else None
        if verb and not verb[0].startswith("-"):
            function = getattr(component, verb[0], None)
        arguments = sys.argv[1 + len(verb) :]
        if callable(function) and "--help" not in arguments:
            arguments = checked(inspect.signature(function), arguments)
        fire.Fire(component, [*verb, *arguments], name)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt, job.Terminated) as e:
        raise SystemExit(_report(e, name)) from None


def _terminate(*_: object) -> None:
    """Raise, so that whatever is half-written is removed, as it is by Ctrl-C."""
    raise job.Terminated(143)


def _report(error: BaseException, name: str) -> int:
    """Say why the command ends, with several ranks once for all of them; the exit code."""
    told = error
    if job.is_launched():  # by torchrun, which may interrupt a report, too
        for interrupt in (signal.SIGTERM, signal.SIGINT):
            signal.signal(interrupt, signal.SIG_IGN)
        reason = tensor_parallel.end_job(error)
        own = isinstance(error, MISTAKES) and not tensor_parallel.is_collective_error(error)
        told = error if own and job.is_leader() else reason
    if isinstance(told, KeyboardInterrupt):
        return 130
    if isinstance(told, job.Terminated):
        return 143
    if isinstance(told, BrokenPipeError):  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    mine = job.claim_report()
    bug = error.__cause__ if isinstance(error, job.RankError) else error
    if isinstance(bug, Exception) and not isinstance(bug, MISTAKES):
        traceback.print_exception(bug)
    if mine and isinstance(told, MISTAKES):
        print(f"{name}: {told}", file=sys.stderr)
    return 2 if isinstance(told, MISTAKES) else 1


def checked(signature: inspect.Signature, arguments: list[str]) -> list[str]:
    """The arguments as Fire should have them.

    Fire runs the whole command before it complains of an argument that was left over, and reads a
    text such as 1e3 or a#b as something else.

    Raises:
        ValueError: an unknown flag, more words than the command takes, or one that is not text.
    """
    positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    result: list[str] = []
    parameter: inspect.Parameter | None = None  # whose value comes next
    leading = 0
    for argument in arguments:
        if not argument.isascii() and re.search("[\ud800-\udfff]", argument):
            raise ValueError(f"{argument!a} is not text in UTF-8")
        if re.fullmatch("-[a-zA-Z]", argument):  # short for the one flag that begins so
            names = [name for name in signature.parameters if name[0] == argument[1]]
            argument = f"--{names[0]}" if len(names) == 1 else f"-{argument}"
        flag, equals, value = argument.partition("=")
        if flag.startswith("--"):
            name = flag[2:].replace("-", "_")
            known = signature.parameters
            parameter = known.get(name)
            if parameter is None and name.removeprefix("no") not in known:
                raise ValueError(f"unknown flag {flag}; the flags are {sorted(known)}")
            result.append(flag + (f"={_quoted(value, parameter)}" if equals else ""))
            is_switch = parameter is None or parameter.annotation in (bool, "bool")
            if is_switch and not equals:  # else Fire takes the next word for its value
                result[-1] = f"--{name}=True" if parameter else f"--{name.removeprefix('no')}=False"
            if is_switch and equals and value not in ("True", "False"):
                raise ValueError(f"{flag} must be of type bool: give it alone, or =True or =False")
            parameter = None if equals or is_switch else parameter
            continue
        if parameter is None:
            if leading == len(positional):
                raise ValueError(f"too many words: {argument!r}; quote a text with spaces")
            parameter, leading = positional[leading], leading + 1
        result.append(_quoted(argument, parameter))
        parameter = None
    return result


def _quoted(value: str, parameter: inspect.Parameter | None) -> str:
    """As a Python literal, where a text is wanted."""
    return repr(value) if parameter and "str" in str(parameter.annotation) else value
