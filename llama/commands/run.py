"""How a command ends: exit codes, one-line errors, signals, log messages. Knows no verb.

Imports torch only if the command did, or runs under torchrun.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable

from llama.common.errors import RankError, Terminated

MISTAKES = (ValueError, TypeError, OSError, ImportError, RuntimeError, RankError)


def run_command(command: Callable[[], object], name: str) -> None:
    """Call `command`; if it raises, report the error and exit.

    A user's mistake is one line on stderr and exit code 2, a bug a traceback and exit code 1,
    Ctrl-C exit code 130, SIGTERM 143. Output that nobody reads any more (`| head`) is no error.

    Args:
        name: of the program, which begins the line.
    """
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # closed by the parent process
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115 - as long as the process
    signal.signal(signal.SIGTERM, _terminate)
    _show_log_messages()
    try:
        _check_text(sys.argv[1:])
        command()
        sys.stdout.flush()
    except BaseException as e:
        if type(e) is SystemExit:  # an exit code that the command chose
            raise
        raise SystemExit(_report(e, name)) from None


def _terminate(*_: object) -> None:
    """Raise, so that half-written files are removed, as after Ctrl-C."""
    raise Terminated(143)


def _check_text(arguments: list[str]) -> None:
    """Raise a ValueError for an argument that is not valid UTF-8."""
    for argument in arguments:
        if not argument.isascii() and re.search("[\ud800-\udfff]", argument):
            raise ValueError(f"{argument!a} is not text in UTF-8")


def _show_log_messages() -> None:
    """Write the library's log messages to stderr, as bare lines, on the leader rank."""
    logger = logging.getLogger("llama")
    handler = logging.StreamHandler()
    handler.addFilter(_is_from_leader)
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _is_from_leader(_: logging.LogRecord) -> bool:
    from llama.distributed import job

    return job.is_leader()


def _report(error: BaseException, name: str) -> int:
    """Print why the command ends, with several ranks once for all of them; the exit code."""
    launched = "RANK" in os.environ  # otherwise torch need not be imported for a mistyped flag
    shown = _agree_with_ranks(error) if launched else error
    if isinstance(shown, KeyboardInterrupt):
        return 130
    if isinstance(shown, Terminated):
        return 143
    if isinstance(shown, BrokenPipeError):  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    reports = not launched or _claim_report()
    bug = error.__cause__ if isinstance(error, RankError) else error
    if isinstance(bug, Exception) and not isinstance(bug, MISTAKES):
        traceback.print_exception(bug)
    if reports and isinstance(shown, MISTAKES):
        print(f"{name}: {shown}", file=sys.stderr)
    return 2 if isinstance(shown, MISTAKES) else 1


def _agree_with_ranks(error: BaseException) -> BaseException:
    """The error that ends the job, which may be another rank's."""
    from llama.distributed import job, tensor_parallel

    if not job.is_launched():
        return error
    for interrupt in (signal.SIGTERM, signal.SIGINT):  # torchrun may send them during the report
        signal.signal(interrupt, signal.SIG_IGN)
    reason = tensor_parallel.end_job(error)
    own = isinstance(error, MISTAKES) and not tensor_parallel.is_collective_error(error)
    return error if own and job.is_leader() else reason


def _claim_report() -> bool:
    """Whether this rank is the one that reports."""
    from llama.distributed import job

    return job.claim_report()
