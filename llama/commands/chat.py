"""A dialog in the terminal, or over a pipe: `llama3 chat`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama.distributed import job, tensor_parallel
from llama.engine.request import Generation
from llama.generation import Llama, Stream
from llama.tokenizer import Message

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession

HELP = """\
/system TEXT  tell the model how to behave (without TEXT: show what it was told)
/undo         drop the last message and its answer
/reset        begin a new dialog; what /system told stays
/save FILE    write the dialog as JSON, to a new file or the one it was in
/load FILE    go on with a saved dialog
/quit         end, as Ctrl-D does; Ctrl-C stops an answer (under torchrun, the job)
A message that begins with "/" is sent if a space stands before it."""
# A model may write anything; only text may reach a terminal, not what moves its cursor.
CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


class Chat:
    """A dialog and the commands that change it. Answers go to stdout, all else to stderr.

    Args:
        options: of `Llama.chat_stream`.
        interactive: Ctrl-C stops an answer; otherwise it ends the program, as with several ranks.
    """

    def __init__(
        self,
        llama: Llama,
        options: dict[str, Any],
        system: str | None = None,
        interactive: bool = True,
    ):
        if llama.formatter is None:
            raise ValueError("this is a base model, without a chat format; use `llama3 complete`")
        self.llama, self.options, self.interactive = llama, options, interactive
        self.formatter = llama.formatter
        self.dialog: list[Message] = []
        self.file: Path | None = None  # where this dialog was saved or came from
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: tell(HELP),
            "/system": self.system,
            "/undo": self.undo,
            "/reset": self.reset,
            "/save": self.save,
            "/load": self.load,
        }
        if system:
            self.system(system)

    def run(self, lines: Iterator[str]) -> bool:
        """Answer line by line until they end; whether all of them could be served."""
        served = True
        for line in lines:
            if not line.strip():
                continue
            command, _, argument = line.strip().partition(" ")
            try:
                if not line.startswith("/"):
                    self.answer(line.strip())
                elif command in ("/quit", "/exit"):
                    break
                elif command in self.commands:
                    self.commands[command](argument.strip())
                else:
                    raise ValueError(f"no command {command}; /help lists them")
            except BrokenPipeError:  # nobody reads the answers any more
                raise
            except (ValueError, TypeError, OSError, RuntimeError) as e:
                served = False
                tell(str(e))
        return served

    def answer(self, text: str) -> None:
        """Stream the answer, and keep it and the question in the dialog, also if it is stopped.

        Raises:
            ValueError: the dialog no longer fits; it stays as it was.
        """
        answer, start, first, n = "", time.perf_counter(), 0.0, 0
        stream: Stream | None = None
        asked: list[Message] = [*self.dialog, {"role": "user", "content": text}]
        tensor_parallel.broadcast_json(asked)
        try:
            stream = self.llama.chat_stream(asked, **self.options)
            for piece in stream:
                first = first or time.perf_counter()
                n += len(piece.tokens)
                answer += piece.text
                with tensor_parallel.ends_job_on_error():  # the other ranks go on with the answer
                    say(piece.text)
            reason = stream.generation.finish_reason if stream.generation else None
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            reason = "cancelled"
        except ValueError as e:
            if "more than max_seq_len" not in str(e):
                raise
            room = self.llama.model.params.max_seq_len
            raise ValueError(
                f"the dialog would be longer than {room} tokens: /undo drops its last message, "
                "/reset all; or start with a larger --max_seq_len"
            ) from None
        finally:
            if stream is not None:
                stream.close()
        if answer or reason != "cancelled":
            self.dialog = [*asked, {"role": "assistant", "content": answer}]
        say("\n")
        if stream is not None and stream.generation is not None:
            rate = (n - 1) / (time.perf_counter() - first) if n > 1 else 0.0
            tell(_status(stream.generation, reason, first - start if first else 0.0, rate))

    def system(self, text: str) -> None:
        """Set the system message, or show it."""
        told = bool(self.dialog) and self.dialog[0]["role"] == "system"
        if not text:
            tell(self.dialog[0]["content"] if told else "nothing was told; /system TEXT does")
            return
        self.dialog[: int(told)] = [{"role": "system", "content": text}]
        tell("the model is told so")

    def undo(self, _: str = "") -> None:
        """Drop the last of the user's messages and what follows it."""
        asked = [i for i, message in enumerate(self.dialog) if message["role"] == "user"]
        if not asked:
            raise ValueError("there is no message to drop")
        del self.dialog[asked[-1] :]
        tell(f"dropped; {len(self.dialog)} messages are left")

    def reset(self, _: str = "") -> None:
        """Forget all but the system message."""
        self.dialog = [message for message in self.dialog[:1] if message["role"] == "system"]
        self.file = None
        tell("a new dialog")

    def save(self, name: str) -> None:
        """Write the dialog, whole or not at all, and over no file that is not its own."""
        path = _path(name).resolve()
        if not self.dialog:
            raise ValueError("there is nothing to save yet")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent}")
        if path.exists() and path != self.file:
            raise FileExistsError(f"{path} is there already; use another name")
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self.dialog, ensure_ascii=False, indent=1), "utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        self.file = path
        tell(f"{len(self.dialog)} messages written to {path}")

    def load(self, name: str) -> None:
        """Go on with a saved dialog; the present one is given up if it can be read."""
        path = _path(name).resolve()
        self.dialog, self.file = self._read(path), path
        tell(f"{len(self.dialog)} messages read")

    def _read(self, path: Path) -> list[Message]:
        try:
            dialog = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError):
            raise ValueError(f"{path} is not a saved dialog") from None
        if not isinstance(dialog, list):
            raise ValueError(f"{path} is not a list of messages")
        for message in dialog:
            self.formatter.encode_message(message)  # which says what is wrong with it
        return dialog


def follow(llama: Llama, options: dict[str, Any]) -> None:
    """What every rank but the first does: compute the answers that the first one is asked for."""
    while (asked := tensor_parallel.broadcast_json(None)) is not None:
        with suppress(ValueError, TypeError, RuntimeError):  # which the first rank tells
            for _ in llama.chat_stream(asked, **options):
                pass


def _status(generation: Generation, reason: str | None, first: float, rate: float) -> str:
    prompt, n = len(generation.request.prompt), len(generation.ids)
    reused = generation.reused
    parts = [
        f"{prompt} prompt tokens: {reused} reused, {prompt - reused} prefilled",
        f"first token {first:.2f} s" if first else "",
        f"{n} tokens" + (f", {rate:.1f} tok/s" if rate else ""),
        {"cancelled": "stopped", "length": "cut at its greatest length"}.get(reason or "", ""),
    ]
    return " | ".join(filter(None, parts))


def _path(name: str) -> Path:
    if not name:
        raise ValueError("name a file after the command")
    return Path(name).expanduser()


def say(text: str) -> None:
    """To stdout, now."""
    print(text.translate(CONTROL) if sys.stdout.isatty() else text, end="", flush=True)


def tell(text: str) -> None:
    """To stderr, dim in a terminal, so that it does not look like an answer."""
    text = text.translate(CONTROL)
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)


def lines_of_stdin() -> Iterator[str]:
    """What the user types, line by line, with history and editing; or a pipe's lines.

    Raises:
        ImportError: at once, if the package for it is missing.
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
    tell(f"/help lists commands, Ctrl-C stops {stopped}, Ctrl-D ends")
    failures = 0
    while failures < 3:
        try:
            line = session.prompt()
            failures = 0
            yield line
        except KeyboardInterrupt:
            tell("Ctrl-D ends")
        except RuntimeError:  # Ctrl-C while its event loop began or ended
            failures += 1
        except EOFError:
            return
