"""The lines that a user types in a terminal: history, completion, several lines. Knows no model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.commands.terminal import print_note
from llama.common.extras import install_line

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession


def typed_lines(
    commands: Mapping[str, Sequence[str] | None], history: Path, hint: str
) -> Iterator[str]:
    """The lines that the user types, until Ctrl-D.

    Tab completes commands and what follows them; Alt-Enter begins another line of the same
    message; Ctrl-Z suspends the program.

    Args:
        commands: each command, with the words that may follow it (None: a path).
        history: the file that keeps what was typed, for later sessions. LLAMA3_HISTORY names
            another one; if it is empty, nothing is kept.
        hint: a line to begin with.

    Raises:
        ImportError: at once, if prompt_toolkit is missing.
    """
    try:
        from prompt_toolkit import PromptSession
    except ImportError as e:
        raise ImportError(f"chat in a terminal needs a package: {install_line('chat')}") from e
    session: PromptSession[str] = PromptSession(
        "> ",
        history=_history(history),
        completer=_completer(commands),
        complete_while_typing=False,
        key_bindings=_keys(),
        enable_suspend=True,
        prompt_continuation="  ",
    )
    return _read(session, hint)


def _read(session: PromptSession[str], hint: str) -> Iterator[str]:
    print_note(hint)
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


def _history(path: Path) -> Any:
    """The history in a file that only the user can read; in memory if it cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    chosen = os.environ.get("LLAMA3_HISTORY")
    if chosen == "":
        return InMemoryHistory()
    path = Path(chosen).expanduser() if chosen else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def _keys() -> Any:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return keys


def _completer(commands: Mapping[str, Sequence[str] | None]) -> Any:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class CommandCompleter(Completer):
        def get_completions(self, document: Document, complete_event: Any) -> Iterator[Completion]:
            text = document.text_before_cursor
            command, space, rest = text.partition(" ")
            if not space:
                found = (name for name in commands if text and name.startswith(text))
            elif command not in commands:
                return
            elif (follows := commands[command]) is None:
                yield from paths.get_completions(Document(rest), complete_event)
                return
            else:
                text = rest
                found = (word for word in follows if word.startswith(rest))
            yield from (Completion(word, start_position=-len(text)) for word in found)

    return CommandCompleter()
