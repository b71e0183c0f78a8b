"""Text from and to a terminal or a pipe. Knows no verb."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llama.distributed import job

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

# A model may generate control characters. They must not move the cursor of the user's terminal.
CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


def print_text(text: str) -> None:
    """Print generated text on stdout at once, without a line end."""
    print(text.translate(CONTROL) if sys.stdout.isatty() else text, end="", flush=True)


def print_note(text: str) -> None:
    """Print a line on stderr; in a terminal dim, to look different from an answer."""
    text = text.translate(CONTROL)
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def read_lines() -> Iterator[str]:
    """The lines that the user types, with history and editing; or the lines of a pipe.

    Raises:
        ImportError: at once, if prompt_toolkit is needed and missing.
    """
    if not sys.stdin.isatty():
        return (line.decode("utf-8", "replace") for line in sys.stdin.buffer)
    try:
        from prompt_toolkit import PromptSession
    except ImportError as e:
        raise ImportError("chat in a terminal needs: pip install 'llama3[chat]'") from e
    return _typed_lines(PromptSession("> "))


def _typed_lines(session: PromptSession[str]) -> Iterator[str]:
    stopped = "the job" if job.is_launched() else "an answer"
    print_note(f"/help lists commands, Ctrl-C stops {stopped}, Ctrl-D ends")
    failures = 0
    while failures < 3:
        try:
            line = session.prompt()
            failures = 0
            yield line
        except KeyboardInterrupt:
            print_note("Ctrl-D ends")
        except RuntimeError:  # Ctrl-C while prompt_toolkit's event loop started or ended
            failures += 1
        except EOFError:
            return
