"""serve.py: what ends the process, and how."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama import Llama
from llama.engine.request import Event
from llama.server.serve import bound_socket, serve
from llama.server.settings import ServerSettings
from tests.server.running import slowed, wait_for

LONG = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "temperature": 0}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


class Caller:
    """Calls a server on a port in a thread, while the test's main thread serves.

    Args:
        script: gets a client; its error, if any, is raised by `result`.
    """

    def __init__(self, port: int, script: Callable[[httpx.Client], object]):
        self._script = script
        self._error: BaseException | None = None
        self.url = f"http://127.0.0.1:{port}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            with httpx.Client(base_url=self.url, timeout=60) as http:
                wait_for(lambda: is_ready(http))
                self._script(http)
        except BaseException as e:
            self._error = e
            os.kill(os.getpid(), signal.SIGTERM)

    def result(self) -> None:
        self._thread.join(60)
        if self._error is not None:
            raise self._error


def is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def run(llama: Llama, script: Callable[[httpx.Client], object], **settings: Any) -> None:
    """Serve in this thread until `script`, in another, has sent a signal."""
    port = free_port()
    caller = Caller(port, script)
    serve(ServerSettings(port=port, **settings), lambda: llama)
    caller.result()
    assert not llama.engine.busy


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_idle(tiny_llama: Llama) -> None:
    run(tiny_llama, lambda http: stop())


def in_thread(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call)
    thread.start()
    return thread


def test_running_requests_end_and_new_ones_are_refused(tiny_llama: Llama) -> None:
    found: list[httpx.Response] = []

    def script(http: httpx.Client) -> None:
        body = LONG | {"max_tokens": 60}
        running = in_thread(lambda: found.append(http.post("/v1/completions", json=body)))
        wait_for(lambda: tiny_llama.engine.busy)
        stop()
        wait_for(lambda: http.get("/health").status_code == 503)
        found.append(http.post("/v1/completions", json=body))
        running.join()

    with slowed(tiny_llama, 0.005):
        run(tiny_llama, script)
    refused, answered = sorted(found, key=lambda response: -response.status_code)
    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert answered.json()["usage"]["completion_tokens"] == 60


@pytest.mark.parametrize("phase", ["prefill", "decode", "queue"])
def test_what_outlasts_the_grace_is_cancelled(tiny_llama: Llama, phase: str) -> None:
    found: list[str] = []
    prompt = "word " * 400 if phase == "prefill" else "a"
    rows = 4 if phase == "queue" else 0
    unfinished = tiny_llama.engine._unfinished

    def ask(http: httpx.Client, body: dict[str, Any]) -> None:
        with http.stream("POST", "/v1/completions", json=body) as response:
            found.append("".join(response.iter_lines()) + f" {response.status_code}")

    def script(http: httpx.Client) -> None:
        body = LONG | {"prompt": prompt, "stream": True}
        threads = [in_thread(lambda: ask(http, LONG | {"stream": True})) for _ in range(rows)]
        wait_for(lambda: unfinished.left == rows)
        threads.append(in_thread(lambda: ask(http, body)))
        wait_for(lambda: unfinished.left == rows + 1)
        if phase == "decode":
            wait_for(lambda: any(g.ids for g in unfinished))
        stop()
        for thread in threads:
            thread.join()

    with slowed(tiny_llama, 0.02, prefill_chunk=4):
        run(tiny_llama, script, grace=0.1)
    assert len(found) == rows + 1
    for text in found:  # an error of HTTP, or of the stream if that had begun
        assert "the server is stopping" in text and "[DONE]" not in text
    assert any(text.endswith("503") for text in found) or phase == "decode"


SCRIPT = """
import sys, time
from llama import Llama
from llama.commands.run import run_command
from llama.server.serve import serve
from llama.server.settings import ServerSettings

def open_llama():
    print("loading", flush=True)
    if sys.argv[1] == "hang":
        time.sleep(1000)
    llama = Llama.build(sys.argv[2], sys.argv[3], 512, 2, device="cpu")
    step = llama.engine.step
    def slow_step():
        time.sleep(0.05)
        return step()
    llama.engine.step = slow_step
    return llama

run_command(lambda: serve(ServerSettings(port=0), open_llama), "server")
"""


@pytest.fixture
def start(folder: Path, byte_tokenizer_path: Path) -> Iterator[Callable[[str], Any]]:
    """Starts a process that serves slowly, or does not end to load ("hang")."""
    processes: list[subprocess.Popen[str]] = []

    def start_process(how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, how, str(folder), str(byte_tokenizer_path)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, text=True, **pipes)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "loading\n"
        return process

    yield start_process
    for process in processes:
        process.kill()
        process.communicate()


def url_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    return next(word for word in line.split() if word.startswith("http://127.0.0.1:"))


def test_a_signal_while_loading(start: Callable[[str], subprocess.Popen[str]]) -> None:
    process = start("hang")
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


def test_loading_fails() -> None:
    def open_llama() -> Llama:
        raise ValueError("this checkpoint is damaged")

    with pytest.raises(ValueError, match=r"^this checkpoint is damaged$"):
        serve(ServerSettings(port=0), open_llama)


def test_the_second_signal_ends_at_once(start: Callable[[str], subprocess.Popen[str]]) -> None:
    process = start("serve")
    with httpx.Client(base_url=url_of(process), timeout=60) as http:
        body = LONG | {"stream": True}
        with http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
            process.send_signal(signal.SIGINT)
            wait_for(lambda: http.get("/health").status_code == 503)
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == 130


def test_the_engine_breaks(tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread is dead: requests fail at once, and the process ends with the cause."""
    step, steps = tiny_llama.engine.step, 0

    def break_at_third() -> list[Event]:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyError("a bug")
        return step()

    def script(http: httpx.Client) -> None:
        assert http.post("/v1/completions", json=LONG).status_code == 503
        assert http.get("/health").status_code == 503
        assert http.post("/v1/completions", json=LONG).status_code == 503

    monkeypatch.setattr(tiny_llama.engine, "step", break_at_third)
    with pytest.raises(KeyError, match="a bug"):
        run(tiny_llama, script)


def test_addresses_that_cannot_be_used() -> None:
    with bound_socket("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        words = f"another program listens on port {port}; end it"
        with pytest.raises(ValueError, match=words), bound_socket("127.0.0.1", port):
            pass
    words = "is no address of this machine; use 127"
    for host in ("203.0.113.7", "a" * 80):  # no name: it would be looked up
        with pytest.raises(ValueError, match=words), bound_socket(host, 0):
            pass
