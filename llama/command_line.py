"""A function, or an object's methods, as a command line. Knows no verb."""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
from typing import Any

import fire


def run(component: Any, name: str) -> None:
    """Run a function or an object's methods as a command line.

    A mistake is one line on stderr and exit code 2; Ctrl-C is exit code 130.
    """
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # closed by who started us
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115 - as long as the process
    # So that whatever is half-written is removed, as it is by Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
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
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as e:
        print(f"{name}: {e}", file=sys.stderr)
        raise SystemExit(2) from None


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
