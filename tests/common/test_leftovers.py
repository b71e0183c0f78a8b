"""leftovers.py, files.py: what a killed process leaves is removed, and nothing else."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from llama.common.files import new_folder

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from pathlib import Path
from llama.common.files import new_folder
with new_folder(Path(sys.argv[1])) as temporary:
    (temporary / "part").write_text("half")
    print("ready", flush=True)
    {}
"""


def start(dst: Path, body: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED.format(body), str(dst)]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def test_after_kill_9_the_next_run_removes_what_was_left_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dst = tmp_path / "a [model]"
    killed = start(dst, "os.kill(os.getpid(), signal.SIGKILL)")
    killed.communicate()
    [left] = tmp_path.iterdir()
    others = [tmp_path / f".other.{'a' * 32}.tmp", tmp_path / f".{dst.name}.notes.tmp"]
    for other in others:
        other.mkdir()
    with caplog.at_level(logging.INFO, "llama"), new_folder(dst) as temporary:
        (temporary / "part").write_text("whole")
    assert (dst / "part").read_text() == "whole"
    assert {path.name for path in tmp_path.iterdir()} == {dst.name, *(p.name for p in others)}
    assert f"removed {left}, which a process that was killed has left" in caplog.text


def test_the_folder_of_a_running_process_is_not_removed(tmp_path: Path) -> None:
    dst = tmp_path / "model"
    running = start(dst, "input()")
    assert running.stdout is not None and running.stdout.readline() == "ready\n"
    with pytest.raises(KeyError), new_folder(dst):
        raise KeyError
    [theirs] = tmp_path.iterdir()
    assert (theirs / "part").is_file()
    running.communicate("\n")
    assert running.returncode == 0 and (dst / "part").read_text() == "half"


def test_the_only_copy_of_a_replaced_folder_is_kept(tmp_path: Path) -> None:
    """A process was killed between its two renames."""
    old = tmp_path / f".model.{'0' * 32}.old"
    old.mkdir()
    with new_folder(tmp_path / "model"):
        pass
    assert old.is_dir()
    with new_folder(tmp_path / "model", replace=True):
        pass
    assert not old.exists()


TOGETHER = """
import sys
from pathlib import Path
from llama.common.files import new_folder
for _ in range(300):
    try:
        with new_folder(Path(sys.argv[1]), replace=True) as temporary:
            (temporary / "part").write_text("whole")
    except FileExistsError:  # the other was faster
        pass
"""


def test_processes_that_write_one_folder_at_a_time_keep_each_others(tmp_path: Path) -> None:
    """Also in the moments before a temporary folder is locked, and while it is renamed."""
    dst = tmp_path / "model"
    command = [sys.executable, "-c", TOGETHER, str(dst)]
    running = [
        subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE) for _ in range(3)
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert (dst / "part").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [dst]
