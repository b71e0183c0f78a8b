"""run.py, waiting.py: signals, encodings, messages that quote anybody, what is imported when."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from llama.commands.options import with_flags

ROOT = Path(__file__).parents[2]


def run_code(body: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A process that calls `run_command` with a function of this body."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    code = f"import os, sys\ndef command():\n{lines}from llama.commands.run import run_command\n"
    unset = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        [sys.executable, "-c", code + "run_command(command, 'name')"],
        capture_output=True,
        cwd=ROOT,
        env=kept | environment,
    )


@pytest.mark.parametrize(
    ("environment", "spins"),
    [
        ({}, "1000"),
        ({"OMP_WAIT_POLICY": "active"}, None),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"KMP_BLOCKTIME": "0"}, None),
    ],
)
def test_threads_sleep_soon_unless_the_user_has_chosen(
    environment: dict[str, str], spins: str | None
) -> None:
    done = run_code("print(os.environ.get('GOMP_SPINCOUNT'))", **environment)
    assert done.stdout.decode() == f"{spins}\n"


def test_a_setting_that_would_come_too_late_is_not_made() -> None:
    """Torch is imported by whoever uses the library; importing `llama` sets nothing either."""
    code = "import sys, os; sys.modules['torch'] = os; import llama\n"
    code += "from llama.commands.run import run_command\n"
    code += "run_command(lambda: print('GOMP_SPINCOUNT' in os.environ), 'name')"
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("words", [["--version"], ["-V"], ["plan", "--shape", "8b"], ["--help"]])
def test_what_needs_no_torch_does_not_import_it(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "llama", *words], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0 and done.stdout and done.stderr == ""


# A library that is being imported: it catches what it can, or fails in another way.
SWALLOWS = """
import time
print("importing", flush=True)
while True:
    try:
        time.sleep(60)
    except BaseException:
        pass
"""
FAILS = """
import time
print("importing", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    raise ImportError("a part of this library is missing")
"""


@pytest.mark.parametrize(
    ("words", "library"),
    [
        (["-m", "llama", "complete", "Hi"], SWALLOWS),
        (["-m", "llama", "train", "--help"], SWALLOWS),
        (["example_chat_completion.py"], FAILS),
    ],
)
def test_ctrl_c_while_importing_is_one_line(words: list[str], library: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(library)
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    child = pexpect.spawn(
        sys.executable, words, cwd=str(ROOT), env=env, encoding="utf-8", timeout=60
    )
    try:
        child.expect("importing\r\n")
        child.sendintr()
        child.expect(pexpect.EOF)
        child.close()
    finally:
        child.close(force=True)
    name = "llama3" if words[0] == "-m" else words[0]
    assert child.before == f"^C\r\n{name}: interrupted\r\n"  # the prompt has a line of its own
    assert child.exitstatus == 130


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_output_in_any_encoding(encoding: str) -> None:
    """What it lacks is escaped; JSON stays JSON."""
    body = "from llama.commands.terminal import print_json, print_text\n"
    body += "print_text('caf\\xe9 \\u65e5 \\u2026\\n')\nprint('caf\\xe9 \\u65e5')\n"
    body += "print_json({'text': 'caf\\xe9 \\u65e5 \\x9b'})"
    done = run_code(body, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    text, plain, line = done.stdout.decode(encoding).splitlines()
    for shown in (text, plain):
        cafe, day = shown.split()[:2]
        assert cafe == (r"caf\xe9" if encoding == "ascii" else "café")
        assert day == ("日" if encoding == "utf-8" else r"\u65e5")
    assert json.loads(line) == {"text": "café 日 \x9b"} and "\x9b" not in line


@pytest.mark.parametrize(
    "body",
    [
        "raise ValueError('{}')",
        "raise OSError('{}')",
        "open('/{}')",
        "import logging; logging.getLogger('llama').warning('{}')",
        "raise KeyError('{}')",
        "from llama.commands.terminal import print_note; print_note('{}')",
        "from llama.commands.terminal import print_report; print_report('{}')",
    ],
)
def test_escapes_do_not_reach_the_terminal_in_messages(body: str) -> None:
    evil = "a\\x1b[2J\\x9b\\u202eb\\x07"
    done = run_code(body.format(evil))
    shown = (done.stdout + done.stderr).decode()
    assert "[2J" in shown and not {"\x1b", "\x9b", "\u202e", "\x07"} & set(shown)


def test_a_mistake_that_quotes_a_line_end_is_one_line() -> None:
    done = run_code("raise ValueError('no file a\\nname: every check passed')")
    assert done.stderr.decode() == "name: no file a\\nname: every check passed\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("FileNotFoundError(2, 'No such file', '/x')", "there is no /x; check the name"),
        ("OSError(28, 'No space left on device')", "the disk is full; free some space"),
        ("OSError(28, 'No space', '/x')", "the disk of /x is full; free some space"),
        ("PermissionError(13, 'Permission denied', '/x')", "no permission for /x; give another"),
        ("OSError(5, 'Input/output error', '/x')", "/x: Input/output error"),
    ],
)
def test_errors_of_the_system_have_a_path_and_a_remedy(error: str, message: str) -> None:
    done = run_code(f"raise {error}")
    assert done.returncode == 2
    assert done.stderr.decode().startswith(f"name: {message}") and b"Errno" not in done.stderr


def test_messages_name_the_flags_of_their_verb() -> None:
    flags = frozenset({"max_seq_len", "temperature", "ckpt_dir", "mp"})
    for message, shown in {
        "5 is more than max_seq_len 2": "5 is more than --max_seq_len 2",
        "temperature must be 0 or more": "--temperature must be 0 or more",
        "a temperature of 3": "a temperature of 3",
        "--max_seq_len 2 and x.max_seq_len, max_seq_len=3, /tmp/ckpt_dir/x": None,
        "no folder at /x; check ckpt_dir": "no folder at /x; check --ckpt_dir",
        "mp is for --to meta": "--mp is for --to meta",
    }.items():
        assert with_flags(message, flags) == (shown or message)
    assert with_flags("no folder; check ckpt_dir", frozenset()) == "no folder; check the path"
