"""How a command ends: exit codes, one-line errors, signals, log messages. Knows no verb.

Imports torch only if the command did, or runs under torchrun.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable

from llama.commands.waiting import choose_waiting
from llama.common.errors import RankError, Terminated
from llama.common.printable import printable, printable_line

MISTAKES = (ValueError, TypeError, OSError, ImportError, RuntimeError, RankError)
# What to do about an error of the system that names a file.
REMEDIES = {
    errno.ENOENT: "there is no {}; check the name",
    errno.EISDIR: "{} is a folder; give a file",
    errno.ENOTDIR: "{} is inside of a file; give a folder",
    errno.EACCES: "no permission for {}; give another path, or change its permissions",
    errno.EROFS: "{} is on a disk that cannot be written; choose another",
    errno.ENOSPC: "the disk of {} is full; free some space and call again",
    errno.EDQUOT: "your quota on the disk of {} is used up; free some space and call again",
}


def run_command(command: Callable[[], object], name: str) -> None:
    """Call `command`; if it raises, report the error and exit.

    A user's mistake is one line on stderr and exit code 2, a bug a traceback and exit code 1,
    Ctrl-C one line and exit code 130, SIGTERM 143. Output that nobody reads any more (`| head`) is
    no error.

    Args:
        name: of the program, which begins the line.
    """
    try:
        _prepare_streams()
        signal.signal(signal.SIGTERM, _terminate)
        _show_log_messages()
        _show_warnings(name)
        choose_waiting()
        _check_text(sys.argv[1:])
        command()
        sys.stdout.flush()
    except BaseException as e:
        if type(e) is SystemExit:  # an exit code that the command chose
            raise
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is over already
        raise SystemExit(_report(e, name)) from None
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left that could be lost


def interrupt_at_once(name: str) -> None:
    """Let Ctrl-C end the process without an exception, which libraries being imported may swallow.

    For as long as nothing is written. `raise_interrupts` ends it.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return  # ignored, as in the background of a shell

    def end(*_: object) -> None:
        if os.environ.get("RANK", "0") == "0":
            os.write(2, (_line_start() + f"{name}: interrupted\n").encode())
        os._exit(130)

    signal.signal(signal.SIGINT, end)


def raise_interrupts() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _prepare_streams() -> None:
    """Replace closed streams, and escape what the encoding of the output lacks."""
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # closed by the parent process
            setattr(sys, stream, open(os.devnull, mode))  # noqa: SIM115 - as long as the process
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):
            output.reconfigure(errors="backslashreplace")


def _terminate(*_: object) -> None:
    """Raise, so that half-written files are removed, as after Ctrl-C."""
    raise Terminated(143)


def _check_text(arguments: list[str]) -> None:
    """Raise a ValueError for an argument that is not valid UTF-8."""
    for argument in arguments:
        if not argument.isascii() and re.search("[\ud800-\udfff]", argument):
            raise ValueError(f"{argument!a} is not text in UTF-8")


class _SafeFormatter(logging.Formatter):
    """The bare message, which may quote a file."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _show_log_messages() -> None:
    """Write the library's log messages to stderr, as bare lines, on the leader rank."""
    logger = logging.getLogger("llama")
    handler = logging.StreamHandler()
    handler.setFormatter(_SafeFormatter())
    handler.addFilter(_is_from_leader)
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _show_warnings(name: str) -> None:
    """Write warnings as one line each, on the leader rank."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if _is_from_leader():
            print(printable_line(f"{name}: warning: {message}"), file=sys.stderr)

    warnings.showwarning = show


def _is_from_leader(_: logging.LogRecord | None = None) -> bool:
    if "RANK" not in os.environ:
        return True
    from llama.distributed import job

    return job.is_leader()


def _report(error: BaseException, name: str) -> int:
    """Print why the command ends, with several ranks once for all of them; the exit code."""
    launched = "RANK" in os.environ  # otherwise torch need not be imported for a mistyped flag
    shown = _agree_with_ranks(error) if launched else error
    if isinstance(shown, Terminated):
        return 143
    if isinstance(shown, BrokenPipeError):  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    reports = not launched or _claim_report()
    if _is_interrupt(shown):
        if reports:
            print(f"{_line_start()}{name}: interrupted", file=sys.stderr)
        return 130
    bug = error.__cause__ if isinstance(error, RankError) else error
    if isinstance(bug, Exception) and not isinstance(bug, MISTAKES):
        print(printable("".join(traceback.format_exception(bug))), end="", file=sys.stderr)
    if reports and isinstance(shown, MISTAKES):
        print(f"{name}: {printable_line(error_text(shown))}", file=sys.stderr)
    return 2 if isinstance(shown, MISTAKES) else 1


def error_text(error: BaseException) -> str:
    """What an error says; for an error of the system, the path and what to do."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        path = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        if error.errno in REMEDIES:
            return REMEDIES[error.errno].format(path)
        return f"{path}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space and call again"
    return str(error)


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused an error: interrupted imports end as errors of other types."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _line_start() -> str:
    """A line end if the terminal's cursor may stand in a line: after "^C" or half an answer."""
    return "\n" if sys.stderr is not None and sys.stderr.isatty() else ""


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
