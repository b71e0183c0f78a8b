"""`llama3 VERB`: lists the verbs, parses the command line, calls the verb.

A verb is a function in a module of this folder. The module, and torch with it, is imported when the
verb's flags are needed, so that `llama3 --help` and completing a verb in a shell are quick.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from llama.commands.options import typer_function
from llama.commands.suggestions import too_many_words, unknown_verb, usage_message

# Heading of the help -> verb -> its module in llama/commands.
VERBS = {
    "Generate text": {"chat": "chat", "complete": "generate", "perplexity": "generate"},
    "Understand": {"explain": "explain"},
    "Evaluate": {"eval": "evaluate"},
    "Serve": {"serve": "serve"},
    "Checkpoints": {
        "inspect": "checkpoints",
        "verify": "checkpoints",
        "convert": "checkpoints",
        "quantize": "checkpoints",
        "merge": "merge",
        "download": "checkpoints",
        "demo": "checkpoints",
        "plan": "plan",
    },
    "Train": {"train": "train", "finetune": "finetune", "extend-vocab": "extend_vocab"},
    "About": {"version": "version"},
}
ABOUT = """\
Llama 3 on this machine. `llama3 VERB --help` lists the flags of a verb, with examples. In a flag, a
dash may stand for an underscore: --ckpt_dir and --ckpt-dir are the same. Short names are the same
in every verb: -m --ckpt_dir, -n --max_gen_len, -q --quiet."""
UsageError: Any = typer.BadParameter.__mro__[1]  # typer does not export this class of its errors


class VerbGroup(TyperGroup):
    """All verbs; the help lists them under the headings of VERBS."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for heading, verbs in VERBS.items():
            with formatter.section(heading):
                formatter.write_dl([(verb, self.commands[verb].help) for verb in verbs])


class Verb(TyperCommand):
    """A verb whose module is imported when its flags are needed."""

    def get_params(self, ctx: Any) -> list[Any]:
        if self.callback is None:
            command = make_command(str(self.name))
            self.callback, self.params = command.callback, command.params
            self.help, self.epilog = command.help, command.epilog
        return list(super().get_params(ctx))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        rest = list(super().parse_args(ctx, args))
        if rest and not ctx.resilient_parsing:
            raise ValueError(too_many_words(self, rest[0]))
        return rest


def parse(arguments: list[str]) -> Callable[[], None]:
    """The call that the command line asks for. Prints help or the version if asked for those.

    Raises:
        ValueError: the command line is wrong; one line that says how.
        SystemExit: help or the version has been printed.
    """
    if arguments[:1] == ["help"]:  # `help VERB` is `VERB --help`
        arguments = [*arguments[1:], "--help"]
    app = make_app()
    word = next((word for word in arguments if not word.startswith("-")), None)
    if word is not None and word not in app.commands:
        raise ValueError(unknown_verb(word, list(app.commands)))
    try:
        with app.make_context("llama3", arguments) as ctx:
            call: Callable[[], None] = app.invoke(ctx)
            return call
    except typer.Exit as e:
        raise SystemExit(e.exit_code) from None
    except UsageError as e:
        parameters = make_command(word).params if word is not None else app.params
        raise ValueError(usage_message(e, word, parameters)) from None


def make_app() -> Any:
    """The typer command of `llama3`."""
    app = typer.Typer(
        cls=VerbGroup,
        help=ABOUT,
        rich_markup_mode=None,
        invoke_without_command=True,
        subcommand_metavar="VERB ...",
        context_settings={
            "token_normalize_func": lambda flag: flag.replace("-", "_"),
            "help_option_names": ["--help", "-h"],
        },
    )
    app.callback()(_options)
    group: Any = typer.main.get_command(app)
    for verbs in VERBS.values():
        for verb, module in verbs.items():
            settings = {"allow_extra_args": True}
            command = Verb(verb, help=summary(verb, module), context_settings=settings)
            command.rich_markup_mode = None
            group.add_command(command)
    return group


def _options(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", "-V", help="Print the version.")] = False,
) -> None:
    if version or ctx.invoked_subcommand is None:
        typer.echo(_version() if version else ctx.get_help())
        raise typer.Exit


def _version() -> str:
    from llama.common.version import __version__

    return __version__


def summary(verb: str, module: str) -> str:
    """The first line of a verb's docstring, read without importing the verb's module."""
    name = verb.replace("-", "_")
    [function] = [node for node in _functions(module) if node.name == name]
    return (ast.get_docstring(function) or "").partition("\n")[0]


@cache
def _functions(module: str) -> list[ast.FunctionDef]:
    source = Path(__file__).with_name(f"{module}.py").read_text("utf-8")
    return [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]


def make_command(verb: str) -> Any:
    """The typer command of a verb, with its flags."""
    modules = {name: module for verbs in VERBS.values() for name, module in verbs.items()}
    module = import_module(f"llama.commands.{modules[verb]}")
    function = getattr(module, verb.replace("-", "_"))
    text, _, examples = inspect.cleandoc(function.__doc__ or "").partition("\n\nExamples:\n")
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    epilog = f"\b\nExamples:\n{examples}"  # \b: keep the line ends
    app.command(verb, help=text, epilog=epilog)(typer_function(function))
    return typer.main.get_command(app)
