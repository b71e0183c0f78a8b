"""chat.py, chat_session.py: `llama3 chat` as a user meets it, in a terminal and over a pipe."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest

from llama import Generation, Llama, Request
from llama.commands.chat_session import ChatSession, _status
from llama.commands.terminal import piped_lines
from tests.distributed.test_tensor_parallel import start_torchrun

COMMAND = ["-m", "llama", "chat", "--temperature", "0", "--max_seq_len", "512"]
READY = r">.*\x1b\[\?25h"  # the prompt, and the cursor shown
OPTIONS: dict[str, Any] = {"temperature": 0, "max_gen_len": 12}


def piped(text: str, *flags: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *COMMAND, "--max_gen_len", "12", *flags]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    return done


def contents(chat: ChatSession) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in chat.dialog]


def test_pipe(demo_dir: Path, tmp_path: Path) -> None:
    saved = tmp_path / "dialog.json"
    done = piped(f"What is the capital of France?\n\nAnd of Italy?\n/save {saved}\n")
    assert len(done.stdout.splitlines()) == 2 and "Paris" in done.stdout.splitlines()[0]
    dialog = json.loads(saved.read_text("utf-8"))
    assert [message["role"] for message in dialog] == ["user", "assistant"] * 2
    assert [m["content"] for m in dialog[1::2]] == done.stdout.splitlines()
    # The second turn began where the first one ended.
    first, second = [line for line in done.stderr.splitlines() if "prompt tokens" in line]
    assert "0 reused" in first and "first token" in first and "tok/s" in first
    prompt, reused = (int(second.split(word)[0].split()[-1]) for word in ("prompt", "reused"))
    assert prompt > reused >= int(first.split()[0])
    # Another process goes on with it.
    done = piped(f"/load {saved}\nAnd of Spain?\n/bogus\nStill there?\n", code=1)
    assert "4 messages read" in done.stderr and len(done.stdout.splitlines()) == 2
    assert "no command /bogus; /help lists them" in done.stderr


def test_several_ranks(demo_dir: Path, tmp_path: Path) -> None:
    """Only the first reads and writes, and what one line lacks does not end the others."""
    saved = tmp_path / "dialog.json"
    lines = f"What is the capital of France?\n/bogus\nAnd of Italy?\n/save {saved}\n"
    job = start_torchrun(3, *COMMAND, "--max_gen_len", "12")
    out, err = job.communicate(lines, timeout=240)
    assert job.returncode != 0 and err.count("no command /bogus") == 1
    dialog = json.loads(saved.read_text("utf-8"))
    assert [m["content"] for m in dialog[1::2]] == out.splitlines()
    assert err.count("4 messages written") == 1 and err.count("prompt tokens") == 2
    assert "0 reused" not in err.split("prompt tokens")[2]


def test_terminal(demo_dir: Path, tmp_path: Path) -> None:
    history = tmp_path / "history"
    env = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    env |= {"LLAMA3_HISTORY": str(history)}
    child = pexpect.spawn(sys.executable, COMMAND, encoding="utf-8", timeout=60, env=env)
    try:
        child.expect("Ctrl-D ends")
        child.expect(READY)
        child.send("Write a long story about a cat and a dog.\r")
        child.expect(r"\x1b\[\?2004l.*\w\w\w")  # the line is read, and the answer is coming
        child.sendintr()
        child.expect("prompt tokens: 0 reused.*stopped")
        child.expect(READY)
        child.sendintr()  # at the prompt it ends nothing either
        child.expect("Ctrl-D ends")
        child.expect(READY)
        child.send("/sys\t")  # Tab completes the command
        child.expect("tem")
        child.send(" Answer in one word.\r")
        child.expect("system message set")
        child.expect(READY)
        child.send("/system\r")
        child.expect(r"\x1b\[2mAnswer in one word")
        child.expect(READY)
        child.send("What is the capital of France?\r")
        child.expect("Paris")
        child.expect(r"prompt tokens: \d+ reused")
        child.expect(READY)
        child.sendeof()
        child.expect(pexpect.EOF)
        child.close()
        assert child.exitstatus == 0
        assert "+/system Answer in one word." in history.read_text("utf-8").splitlines()
        assert history.stat().st_mode & 0o077 == 0
    finally:
        child.close(force=True)


def test_commands(demo: Llama, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chat = ChatSession(demo, OPTIONS, system="Be brief.")
    saved = tmp_path / "a dialog.json"
    assert chat.run(iter(["Hi\n", " /not a command\n", f"/save {saved}\n"]))
    before = contents(chat)
    assert [role for role, _ in before] == ["system", *["user", "assistant"] * 2]
    assert before[3][1] == "/not a command"
    assert chat.run(iter(["/undo\n"])) and contents(chat) == before[:3]
    assert chat.run(iter(["/system Be long.\n", "/reset\n"]))
    assert contents(chat) == [("system", "Be long.")]
    assert chat.run(iter([f"/load {saved}\n", f"/save {saved}\n", "/quit\n", "never read\n"]))
    assert contents(chat) == before
    assert list(tmp_path.iterdir()) == [saved]  # nothing temporary is left
    assert "Be brief." not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/load", "write the file's name"),
        ("/load {folder}/absent.json", "there is no .*absent.json; check the name"),
        ("/load {folder}/bad.json", "not a saved dialog"),
        ("/load {folder}/object.json", "not a list of messages"),
        ("/load {folder}/robot.json", "unknown role 'robot'"),
        ("/save {folder}/bad.json", "use another name"),
        ("/save {folder}/none/x.json", "there is no folder"),
        ("/restart", "no command /restart"),
        ("word " * 600, "longer than 256 tokens: /undo"),
    ],
)
def test_mistakes_leave_the_dialog_as_it_was(
    demo: Llama, tmp_path: Path, capfd: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    import re

    files = {"bad": "{", "object": "{}", "robot": '[{"role": "robot", "content": ""}]'}
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(text)
    chat = ChatSession(demo, OPTIONS)
    assert chat.run(iter(["Hi\n"]))
    before = contents(chat)
    assert not chat.run(iter([line.format(folder=tmp_path)]))
    assert re.search(message, capfd.readouterr().err)
    assert contents(chat) == before
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        f"{name}.json": text for name, text in files.items()
    }


def test_a_saved_dialog_is_not_written_over_by_another(
    demo: Llama, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chat, saved = ChatSession(demo, OPTIONS), tmp_path / "saved.json"
    assert not chat.run(iter([f"/save {saved}\n", "/undo\n"]))
    err = capfd.readouterr().err
    assert "nothing to save" in err and "no message to drop" in err and not saved.exists()
    assert chat.run(iter(["Hi\n", f"/save {saved}\n", "Again\n", f"/save {saved}\n"]))
    before = saved.read_text()
    assert len(json.loads(before)) == 4
    assert not chat.run(iter(["/reset\n", "New\n", f"/save {saved}\n"]))
    assert "use another name" in capfd.readouterr().err and saved.read_text() == before


def test_interrupt_over_a_pipe_ends_the_program(
    demo: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.model, "hidden", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ChatSession(demo, OPTIONS, interactive=False).run(iter(["Hi\n", "Again\n"]))
    assert not demo.engine.busy


def test_a_line_that_is_not_text(
    demo: Llama, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is reported and not answered; the others are."""
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\nHi\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    chat = ChatSession(demo, OPTIONS)
    assert not chat.run(piped_lines())
    assert "line 1 of the input is not text in UTF-8 (byte 4)" in capfd.readouterr().err
    assert [content for role, content in contents(chat) if role == "user"] == ["Hi"]


def test_settings(demo: Llama, capfd: pytest.CaptureFixture[str]) -> None:
    chat = ChatSession(demo, OPTIONS)
    assert chat.run(iter(["/set temperature 0.5\n", "/set max_gen_len 3\n", "/set top_k 1\n"]))
    assert chat.options == {"temperature": 0.5, "max_gen_len": 3, "top_k": 1}
    assert chat.run(iter(["Hi\n", "/show\n", "/set max_gen_len none\n"]))
    err = capfd.readouterr().err
    assert "3 tokens" in err and "temperature 0.5" in err and "user: Hi" in err
    before = chat.options
    mistakes = ["/set", "/set temperature", "/set heat 1", "/set temperature hot"]
    mistakes += ["/set temperature -1", "/set max_gen_len 0", "/set top_k 1.5"]
    for line in mistakes:
        assert not chat.run(iter([line]))
        assert chat.options == before
    assert "the names are temperature, top_p" in capfd.readouterr().err


def test_regenerate(demo: Llama, capfd: pytest.CaptureFixture[str]) -> None:
    """It asks the last question again: greedily the answer is the same."""
    chat = ChatSession(demo, OPTIONS)
    assert not chat.run(iter(["/regenerate\n"]))
    assert "no message to answer again" in capfd.readouterr().err
    assert chat.run(iter(["Hi\n", "Who are you?\n"]))
    before = contents(chat)
    assert chat.run(iter(["/regenerate\n"])) and contents(chat) == before
    assert chat.run(iter(["/set max_gen_len 1\n", "/regenerate\n"]))
    assert contents(chat)[:3] == before[:3] and contents(chat)[3] != before[3]


@pytest.mark.parametrize(("reply", "kept"), [("y\n", False), ("n\n", True)])
def test_a_full_context_offers_to_drop_the_oldest_turns(
    demo: Llama, capfd: pytest.CaptureFixture[str], reply: str, kept: bool
) -> None:
    chat = ChatSession(demo, OPTIONS, system="Be brief.")
    first, last = "one " * 90, "two " * 130
    assert chat.run(iter([f"{first}\n"]))
    assert chat.run(iter([f"{last}\n", reply])) != kept
    assert "the dialog is full; drop its oldest 2 messages and answer? y or n" in (
        capfd.readouterr().err
    )
    asked = [content for role, content in contents(chat) if role == "user"]
    assert asked == [first.strip() if kept else last.strip()]
    assert contents(chat)[0] == ("system", "Be brief.")


def test_regenerating_in_a_full_context_keeps_the_new_answer(demo: Llama) -> None:
    """Dropping one turn makes the dialog as long as it was before the last question."""
    chat = ChatSession(demo, OPTIONS, system="Be brief.")
    assert chat.run(iter(["one " * 90 + "\n"]))
    chat.dialog += [{"role": "user", "content": "two " * 130}]
    chat.dialog += [{"role": "assistant", "content": "OLD"}]
    assert chat.run(iter(["/regenerate\n", "y\n"]))
    assert contents(chat)[1] == ("user", "two " * 130)
    assert contents(chat)[2][1] != "OLD" and len(chat.dialog) == 3


def test_a_stopped_answer_is_kept_and_one_that_never_came_is_not(
    demo: Llama, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    chat, hidden = ChatSession(demo, OPTIONS), demo.model.hidden
    for passes, messages in [(0, 0), (4, 2)]:
        left = passes

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return hidden(*args, **kwargs)

        monkeypatch.setattr(demo.model, "hidden", interrupted)
        assert chat.run(iter(["What is the capital of France?\n"]))
        monkeypatch.undo()
        assert len(chat.dialog) == messages and not demo.engine.busy
        assert "stopped" in capfd.readouterr().err
    assert contents(chat)[1][1].startswith("The capital")


def test_control_characters_do_not_reach_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llama.commands.terminal import print_text

    print_text("a\x1b[2Jb\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_text("a\x1b[2Jb\t\x9b\n")
    assert capsys.readouterr().out == "a\x1b[2Jb\na\\x1b[2Jb\t\\x9b\n"


def test_base_model_is_refused(demo: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "formatter", None)
    with pytest.raises(ValueError, match="llama3 complete"):
        ChatSession(demo, OPTIONS)
    monkeypatch.setattr(demo.tokenizer, "chat_format", "template")
    monkeypatch.setattr(demo.tokenizer, "chat_templates", {"default": "{% if %}"})
    with pytest.raises(ValueError, match="chat template"):
        ChatSession(demo, OPTIONS)


def test_the_line_below_an_answer_says_what_was_proposed() -> None:
    generation = Generation(Request([1, 2, 3]), tokens=[1, 2, 3, 4, 5], reused=1)
    line = "3 prompt tokens: 1 reused, 2 prefilled | first token 0.50 s | 2 tokens, 9.0 tok/s"
    assert _status(generation, "stop", 0.5, 9.0) == line
    generation.proposed, generation.accepted = 7, 4
    assert _status(generation, "stop", 0.5, 9.0) == f"{line} | 4 of 7 proposed tokens right"
