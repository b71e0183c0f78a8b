"""A dialog of `llama3 chat` and the commands that change it. Knows no command-line flags."""

from __future__ import annotations

import ast
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from llama.commands.run import error_text
from llama.commands.terminal import print_note, print_remark, print_text
from llama.commands.word_wrap import WordWrap
from llama.common.files import replacing_file
from llama.distributed import tensor_parallel
from llama.engine.request import Generation
from llama.engine.sampling import Sampling
from llama.generation import Llama, Stream
from llama.tokenizer import ChatFormat, Message

HELP = """\
/system TEXT     set the system message, which says how the model should behave
                 (without TEXT: show it)
/set NAME VALUE  change how answers are drawn, such as /set temperature 0.2
/show            show the settings and the dialog
/regenerate      answer the last message again
/undo            drop the last message and its answer
/reset           begin a new dialog with the same system message
/save FILE       write the dialog as JSON, to a new file or the one it was in
/load FILE       continue a saved dialog
/quit            end, as Ctrl-D does; Ctrl-C stops an answer (under torchrun, the job)
Tab completes commands and files, Alt-Enter begins another line, Ctrl-Z suspends.
To send a message that begins with "/", put a space before it."""
SETTINGS = [field.name for field in fields(Sampling)] + ["max_gen_len"]


class ChatSession:
    """A dialog and the commands that change it. Prints answers on stdout, the rest on stderr.

    Args:
        options: keyword arguments of `Llama.chat_stream`.
        system: the first system message.
        interactive: whether Ctrl-C stops only the answer; otherwise it ends the program.
    """

    def __init__(
        self,
        llama: Llama,
        options: dict[str, Any],
        system: str | None = None,
        interactive: bool = True,
    ):
        if llama.formatter is None:
            if llama.tokenizer.chat_templates:
                ChatFormat(llama.tokenizer)  # raises, saying what is wrong with its template
            raise ValueError("this is a base model, without a chat format; use `llama3 complete`")
        self.llama, self.options, self.interactive = llama, options, interactive
        self.formatter = llama.formatter
        self.dialog: list[Message] = []
        self.file: Path | None = None  # where this dialog was saved or loaded from
        self.lines: Iterator[str | ValueError] = iter(())
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: print_note(HELP),
            "/system": self.system,
            "/set": self.set,
            "/show": self.show,
            "/regenerate": self.regenerate,
            "/undo": self.undo,
            "/reset": self.reset,
            "/save": self.save,
            "/load": self.load,
        }
        if system:
            self.system(system)

    def run(self, lines: Iterator[str | ValueError]) -> bool:
        """Answer each line; whether there was no error. A line that is an error is reported."""
        succeeded = True
        self.lines = lines
        for line in lines:
            try:
                if isinstance(line, ValueError):
                    raise line
                if not line.strip():
                    continue
                command, _, argument = line.strip().partition(" ")
                if not line.startswith("/"):
                    self.answer(line.strip())
                elif command in ("/quit", "/exit"):
                    break
                elif command in self.commands:
                    self.commands[command](argument.strip())
                else:
                    raise ValueError(f"no command {command}; /help lists them")
            except BrokenPipeError:  # the reader of our output has gone
                raise
            except (ValueError, TypeError, OSError, RuntimeError) as e:
                succeeded = False
                print_note(error_text(e))
        return succeeded

    def answer(self, text: str) -> None:
        """Stream the answer, and append the question and the answer, also a stopped one.

        Raises:
            ValueError: the dialog would be too long, and the user kept it; it is unchanged.
        """
        asked: list[Message] = [*self.dialog, {"role": "user", "content": text}]
        try:
            self._stream(asked)
        except ValueError as e:
            if "more than max_seq_len" not in str(e):
                raise
            room = self.llama.model.params.max_seq_len
            shorter = self._without_oldest(asked, room)
            if not self.interactive or not shorter or not self._agrees(len(asked) - len(shorter)):
                raise ValueError(
                    f"the dialog would be longer than {room} tokens: /undo drops its last message, "
                    "/reset all; or start with a larger --max_seq_len"
                ) from None
            self._stream(shorter)

    def _stream(self, asked: list[Message]) -> None:
        """Print the answer to a dialog, which becomes `self.dialog` with it."""
        answer, start, first, n = "", time.perf_counter(), 0.0, 0
        stream: Stream | None = None
        wrap = WordWrap(shutil.get_terminal_size().columns) if sys.stdout.isatty() else None
        tensor_parallel.broadcast_json({"dialog": asked, "options": self.options})
        try:
            stream = self.llama.chat_stream(asked, **self.options)
            for piece in stream:
                first = first or time.perf_counter()
                n += len(piece.tokens)
                answer += piece.text
                with tensor_parallel.ends_job_on_error():  # else the other ranks would wait
                    print_text(wrap.feed(piece.text) if wrap else piece.text)
            reason = stream.generation.finish_reason
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            reason = "cancelled"
        finally:
            if stream is not None:
                stream.close()
        if answer or reason != "cancelled":
            self.dialog = [*asked, {"role": "assistant", "content": answer}]
        print_text((wrap.end() if wrap else "") + "\n")
        if stream is not None and stream.generation.id:
            rate = (n - 1) / (time.perf_counter() - first) if n > 1 else 0.0
            print_remark(_status(stream.generation, reason, first - start if first else 0.0, rate))

    def _without_oldest(self, asked: list[Message], room: int) -> list[Message]:
        """The dialog without its oldest turns, so that a quarter of the room is free.

        [] if even the last message alone is too long.
        """
        n = int(asked[0]["role"] == "system")
        starts = [i for i, message in enumerate(asked) if message["role"] == "user" and i > n]
        for start in starts:
            shorter = [*asked[:n], *asked[start:]]
            if len(self.formatter.encode_dialog_prompt(shorter)) <= room * 3 // 4:
                return shorter
        return []

    def _agrees(self, n: int) -> bool:
        """Ask whether to drop the oldest `n` messages."""
        print_note(f"the dialog is full; drop its oldest {n} messages and answer? y or n")
        answer = next(self.lines, "n")
        return isinstance(answer, str) and answer.strip().lower() in ("y", "yes")

    def regenerate(self, _: str = "") -> None:
        """Answer the last message again. After an error the dialog is unchanged."""
        asked = [i for i, message in enumerate(self.dialog) if message["role"] == "user"]
        if not asked:
            raise ValueError("there is no message to answer again")
        before, last = self.dialog, asked[-1]
        shorter = self.dialog = before[:last]
        try:
            self.answer(before[last]["content"])
        finally:
            if self.dialog is shorter:  # there was no answer
                self.dialog = before

    def set(self, words: str) -> None:
        """Change an option: "temperature 0.2"."""
        name, _, text = words.partition(" ")
        if name not in SETTINGS or not text.strip():
            raise ValueError(f"type /set NAME VALUE; the names are {', '.join(SETTINGS)}")
        try:
            value = None if text.strip() in ("none", "None") else ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"{name} must be a number, not {text!r}") from None
        changed = self.options | {name: value}
        if name == "max_gen_len":
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"max_gen_len must be a positive integer or none, not {text!r}")
        else:
            Sampling(**{k: v for k, v in changed.items() if k != "max_gen_len"})
        self.options = changed
        print_note(f"{name} is {value}")

    def show(self, _: str = "") -> None:
        """Show the settings and the dialog."""
        print_note(", ".join(f"{name} {self.options.get(name)}" for name in SETTINGS))
        for message in self.dialog:
            print_note(f"{message['role']}: {message['content']}")

    def system(self, text: str) -> None:
        """Set the system message, or show it."""
        has_one = bool(self.dialog) and self.dialog[0]["role"] == "system"
        if not text:
            print_note(
                self.dialog[0]["content"] if has_one else "there is none; /system TEXT sets it"
            )
            return
        self.dialog[: int(has_one)] = [{"role": "system", "content": text}]
        print_note("system message set")

    def undo(self, _: str = "") -> None:
        """Drop the user's last message and its answer."""
        asked = [i for i, message in enumerate(self.dialog) if message["role"] == "user"]
        if not asked:
            raise ValueError("there is no message to drop")
        del self.dialog[asked[-1] :]
        print_note(f"dropped; {len(self.dialog)} messages are left")

    def reset(self, _: str = "") -> None:
        """Drop all messages but the system message."""
        self.dialog = [message for message in self.dialog[:1] if message["role"] == "system"]
        self.file = None
        print_note("a new dialog")

    def save(self, name: str) -> None:
        """Write the dialog to a new file, or to its own file. Never leaves half a file."""
        path = _path(name).resolve()
        if not self.dialog:
            raise ValueError("there is nothing to save yet")
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent}")
        if path.exists() and path != self.file:
            raise FileExistsError(f"{path} is there already; use another name")
        with replacing_file(path) as temporary:
            temporary.write_text(json.dumps(self.dialog, ensure_ascii=False, indent=1), "utf-8")
        self.file = path
        print_note(f"{len(self.dialog)} messages written to {path}")

    def load(self, name: str) -> None:
        """Replace the dialog by a saved one. After an error it is unchanged."""
        path = _path(name).resolve()
        self.dialog, self.file = self._read(path), path
        print_note(f"{len(self.dialog)} messages read")

    def _read(self, path: Path) -> list[Message]:
        try:
            dialog = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError):
            raise ValueError(f"{path} is not a saved dialog") from None
        if not isinstance(dialog, list):
            raise ValueError(f"{path} is not a list of messages")
        for message in dialog:
            self.formatter.check_message(message)  # raises for a wrong message
        return dialog


def follow(llama: Llama) -> None:
    """On every rank but the first: compute the answers together with rank 0, until it ends."""
    while (asked := tensor_parallel.broadcast_json(None)) is not None:
        with suppress(ValueError, TypeError, RuntimeError):  # rank 0 reports them
            for _ in llama.chat_stream(asked["dialog"], **asked["options"]):
                pass


def _status(generation: Generation, reason: str | None, first: float, rate: float) -> str:
    prompt, n = len(generation.request.prompt), len(generation.ids)
    reused = generation.reused
    parts = [
        f"{prompt} prompt tokens: {reused} reused, {prompt - reused} prefilled",
        f"first token {first:.2f} s" if first else "",
        f"{n} tokens" + (f", {rate:.1f} tok/s" if rate else ""),
        f"{generation.accepted} of {generation.proposed} proposed tokens right"
        if generation.proposed
        else "",
        {"cancelled": "stopped", "length": "cut at the maximum length"}.get(reason or "", ""),
    ]
    return " | ".join(filter(None, parts))


def _path(name: str) -> Path:
    if not name:
        raise ValueError("write the file's name after the command")
    return Path(name).expanduser()
