"""Starts, stops and pauses servers. Knows the command lines of `llama3 serve` and llama-server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from urllib.error import URLError
from urllib.request import urlopen

START_SECONDS = 180  # for loading the weights


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def our_command(ckpt_dir: str, rows: int, length: int, port: int) -> list[str]:
    """`llama3 serve` of this checkout, without speculation: its speed depends on the text."""
    flags = ["--ckpt_dir", ckpt_dir, "--port", str(port), "--no-speculate"]
    flags += ["--max_batch_size", str(rows), "--max_seq_len", str(length)]
    return [sys.executable, "-m", "llama", "serve", *flags]


def llama_cpp_command(binary: str, gguf: Path, rows: int, length: int, port: int) -> list[str]:
    """`llama-server` with as many slots of as many positions, and as many threads."""
    flags = ["--host", "127.0.0.1", "--port", str(port), "--model", str(gguf)]
    flags += ["--parallel", str(rows), "--ctx-size", str(rows * length)]
    threads = str(len(os.sched_getaffinity(0)))
    return [binary, *flags, "--threads", threads, "--threads-batch", threads]


class ServerProcess:
    """A running server. It works only between `resume` and `pause`.

    Args:
        log: a file that gets what the server prints.

    Raises:
        RuntimeError: it ended, or did not become ready.
    """

    def __init__(self, name: str, command: list[str], port: int, log: Path):
        self.name, self.port, self.log = name, port, log
        root = Path(__file__).resolve().parents[1]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=root, start_new_session=True
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.resume()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            with suppress(URLError, OSError):
                if urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).status == 200:
                    return
            time.sleep(0.1)
        text = self.log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"{self.name} did not start; its log ends with:\n{text}")

    def pause(self) -> None:
        """Stop the process, so that it takes no time from another one."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGCONT)

    def resident_mib(self) -> float:
        """Its resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
