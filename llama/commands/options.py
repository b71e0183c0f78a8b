"""Turns the parameters of a verb into typer's flags and arguments. Knows no verb.

A verb is a plain function. What its parameters become:

- a positional parameter, `prompt: Annotated[str, "help"]`: an argument, `PROMPT`;
- a keyword-only parameter, `json: Annotated[bool, "help"] = False`: a flag, `--json`; a list of
  texts is a flag that may be repeated; `bool | None` is `--json` and `--no-json`;
- a frozen dataclass, `sampling: Sampling`: one flag for each of its fields, which are declared with
  `llama.common.options.option`. `Annotated[BuildOptions, Only("seed")]` offers some of them, and
  the others keep their defaults.

Every verb also has `--quiet`.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from types import NoneType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

SHORT = {"ckpt_dir": "-m", "max_gen_len": "-n", "quiet": "-q"}
QUIET = "no progress bars and no remarks on stderr, only errors"


class Only:
    """The names of a dataclass's fields that a verb offers as flags."""

    def __init__(self, *names: str):
        self.names = names


def typer_function(verb: Callable[..., None]) -> Callable[..., Callable[[], None]]:
    """The function that typer calls in place of `verb`: it takes the parsed flags.

    It builds the dataclasses, whose checks run, and returns the call of `verb`, which is to be made
    after the command line has been parsed.
    """
    hints = get_type_hints(verb, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, list[str]]] = {}  # parameter -> dataclass, the fields offered
    for parameter in inspect.signature(verb).parameters.values():
        kind, extras = _split(hints[parameter.name])
        if is_dataclass(kind):
            flags = list(_fields_as_flags(kind, extras))
            groups[parameter.name] = kind, [flag.name for flag in flags]
            parameters += flags
        else:
            positional = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            parameters.append(_flag(parameter.name, kind, parameter.default, extras[0], positional))

    parameters.append(_flag("quiet", bool, False, QUIET))

    def parsed(quiet: bool, **values: Any) -> Callable[[], None]:
        for name, (kind, names) in groups.items():
            group = Call(kind, **{field: values.pop(field) for field in names})
            group.flags = frozenset(names)
            values[name] = group()
        call = Call(verb, **values)
        call.flags = frozenset(p.name for p in parameters)
        return Call(_call_quietly, call) if quiet else call

    parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    parsed.__annotations__ = {p.name: p.annotation for p in parameters}
    return parsed


class Call(partial[Any]):
    """The call of a verb or of a dataclass of its flags. Its errors name flags as they are typed.

    Attributes:
        flags: the names of the flags.
    """

    flags: frozenset[str] = frozenset()

    def __call__(self) -> Any:
        try:
            return super().__call__()
        except (ValueError, TypeError, RuntimeError, FileNotFoundError) as e:
            if len(e.args) == 1 and isinstance(e.args[0], str):
                e.args = (with_flags(e.args[0], self.flags),)
            raise


def with_flags(message: str, flags: frozenset[str]) -> str:
    """A message of the library with `--max_gen_len` in place of `max_gen_len`."""
    if "ckpt_dir" not in flags:
        message = re.sub(r"\bcheck ckpt_dir\b", "check the path", message)
    message = message.replace("or build with a larger", "or use a larger")
    for flag in flags:
        name = rf"(?<![\w./-]){flag}(?![\w./=-])"
        if "_" not in flag:  # may be a common word: only where it is the subject
            name = rf"(?:^{flag}(?= must | is for )|(?<=with ){flag}$)"
        message = re.sub(name, f"--{flag}", message)
    return message


def _call_quietly(call: Callable[[], None]) -> None:
    logging.getLogger("llama").setLevel(logging.ERROR)
    call()


def _fields_as_flags(kind: Any, extras: list[Any]) -> Iterator[inspect.Parameter]:
    """One flag for each field of a dataclass, or for those that an `Only` names."""
    names = next((extra.names for extra in extras if isinstance(extra, Only)), None)
    hints = get_type_hints(kind)
    for field in fields(kind):
        if names is None or field.name in names:
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            yield _flag(field.name, hints[field.name], default, field.metadata["help"])


def _flag(
    name: str, kind: Any, default: Any, help: str, positional: bool = False
) -> inspect.Parameter:
    """A parameter with typer's annotation. The flag is spelled as the parameter."""
    if positional:
        info = typer.Argument(metavar=name.upper(), help=help)
    else:
        # What may be on by default can be switched off.
        optional = bool in get_args(kind) or (kind is bool and default is True)
        flag = f"--{name}/--no-{name}" if optional else f"--{name}"
        info = typer.Option(flag, *filter(None, [SHORT.get(name)]), help=help)
    annotation = Annotated[_text_or_itself(kind), info]  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _split(hint: Any) -> tuple[Any, list[Any]]:
    """The type and the extras of an Annotated, or of a bare type."""
    if get_origin(hint) is Annotated:
        kind, *extras = get_args(hint)
        return kind, extras
    return hint, []


def _text_or_itself(kind: Any) -> Any:
    """`str | None` for `str | torch.device | None`: the command line gives text."""
    kinds = get_args(kind)
    if str in kinds and get_origin(kind) is not list:
        return str | None if NoneType in kinds else str
    return kind
