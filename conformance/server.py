"""`llama3 serve` in a process of its own, for as long as a suite needs it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Server:
    """Where it listens, and the name of its model."""

    port: int
    model: str

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def v1(self) -> str:
        return f"{self.root}/v1"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def serving(log: Path, *flags: str) -> Iterator[Server]:
    """Start a server, wait until its model is loaded, end it with SIGTERM.

    Raises:
        RuntimeError: it ended, or was not ready in five minutes; `log` has its words.
    """
    port = free_port()
    command = [sys.executable, "-m", "llama", "serve", "--port", str(port), *flags]
    with (
        log.open("w") as f,
        subprocess.Popen(
            command, stdout=f, stderr=f, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
        ) as process,
    ):
        try:
            wait_until_ready(port, process, log)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as reply:
                model = json.load(reply)["data"][0]["id"]
            yield Server(port, model)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-2000:]}")
