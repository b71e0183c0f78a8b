"""The page when things go wrong: a killed server, wrong keys, a model that is still loading."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from llama import Llama
from tests.server.running import RunningServer

pytest.importorskip("playwright", reason="playwright is not installed")
from playwright.sync_api import Route, expect

from tests.server.page.browsing import Tab, stream

SERVE = """
import sys, torch
from llama import Llama
from llama.server.serve import serve
from llama.server.settings import ServerSettings
checkpoint, tokenizer, port = sys.argv[1:]
build = lambda: Llama.build(checkpoint, tokenizer, 512, 4, device="cpu", dtype=torch.float32)
serve(ServerSettings(port=int(port)), build, model="tiny")
"""


class CutServer:
    """A server behind a forwarder that drops all connections, as a killed process does."""

    def __init__(self, port: int):
        self.upstream = port
        self.port = free_port()
        self.start()

    def start(self) -> None:
        self.open: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=[self.listener], daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client = listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self.upstream))
                self.open += [client, server]
                for pair in [(client, server), (server, client)]:
                    threading.Thread(target=forward, args=pair, daemon=True).start()

    def kill(self) -> None:
        for one in [self.listener, *self.open]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()


def forward(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


class KilledServer:
    """A server in a process of its own."""

    def __init__(self, checkpoint: Path, tokenizer: Path):
        self.port = free_port()
        self.arguments = [str(checkpoint), str(tokenizer), str(self.port)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", SERVE, *self.arguments])
        url = f"http://127.0.0.1:{self.port}"
        wait_for(lambda: is_healthy(url) or self.process.poll() is not None)
        assert is_healthy(url)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def is_healthy(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/health").status_code == 200
    return False


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    for _ in range(int(seconds * 20)):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(params=["cut", pytest.param("killed", marks=pytest.mark.slow)])
def mortal(request: pytest.FixtureRequest) -> Iterator[CutServer | KilledServer]:
    server: CutServer | KilledServer
    if request.param == "cut":
        server = CutServer(request.getfixturevalue("server").port)
    else:
        folder = request.getfixturevalue("tiny_checkpoint")(use_scaled_rope=True)
        server = KilledServer(folder, request.getfixturevalue("llama3_tokenizer_path"))
    yield server
    server.kill()


def test_a_server_killed_in_the_middle_of_an_answer(
    open_tab: Callable[..., Tab], mortal: CutServer | KilledServer
) -> None:
    tab = open_tab(f"http://127.0.0.1:{mortal.port}")
    tab.send("Hello")
    expect(tab.page.locator(".assistant .body")).not_to_be_empty()
    mortal.kill()
    expect(tab.page.locator(".assistant .notice")).to_contain_text("The connection broke")
    expect(tab.page.locator("#server-notice")).to_contain_text("The server does not answer.")
    partial = tab.contents()[1]
    assert len(partial) > 0
    mortal.start()
    expect(tab.page.locator("#server-notice")).to_be_hidden(timeout=30_000)
    tab.configure(max_tokens=4)
    tab.page.click("text=Go on")
    tab.wait_until_done()
    assert tab.contents()[1].startswith(partial.rstrip("\N{REPLACEMENT CHARACTER}"))
    tab.forgive("Failed to load resource")


def test_a_wrong_key_is_asked_again(
    open_tab: Callable[..., Tab], start_server: Callable[..., RunningServer]
) -> None:
    running = start_server(api_key="secret").wait_until_ready()
    tab = open_tab(running.url)
    expect(tab.page.locator("#key-reason")).to_contain_text("asks for a key")
    tab.page.fill("#key", "wrong")
    tab.page.keyboard.press("Enter")
    expect(tab.page.locator("#key-reason")).to_contain_text("refused this key")
    tab.page.fill("#key", "secret")
    tab.page.keyboard.press("Enter")
    expect(tab.page.locator("#model")).not_to_be_empty()
    tab.configure(max_tokens=3)
    tab.ask("Hello")
    assert len(tab.contents()) == 2
    tab.page.reload()
    expect(tab.page.locator("#model")).not_to_be_empty()  # kept in this tab
    stored = tab.page.evaluate("JSON.stringify(Object.entries(localStorage))")
    assert "cret" not in stored
    tab.forgive("401")


def test_a_refused_dialog_is_not_opened_again(
    open_tab: Callable[..., Tab], start_server: Callable[..., RunningServer]
) -> None:
    running = start_server(api_key="secret").wait_until_ready()
    tab = open_tab(running.url)
    expect(tab.page.locator("#ask-key")).to_be_visible()
    tab.page.keyboard.press("Escape")
    expect(tab.page.locator("#server-notice")).to_contain_text("asks for an API key")
    tab.send("Hello")
    expect(tab.page.locator("#ask-key")).to_be_visible()
    tab.page.keyboard.press("Escape")
    expect(tab.page.locator(".assistant .notice")).to_contain_text("API key")
    tab.forgive("401")


def test_a_loading_model_is_waited_for(
    open_tab: Callable[..., Tab], start_server: Callable[..., RunningServer], tiny_llama: Llama
) -> None:
    may_load = threading.Event()

    def load() -> Llama:
        assert may_load.wait(60)
        return tiny_llama

    tab = open_tab(start_server(load).url)
    expect(tab.page.locator("#server-notice")).to_contain_text("loading")
    tab.send("Hello")
    expect(tab.page.locator(".user .body")).to_have_text("Hello")
    may_load.set()
    expect(tab.page.locator("#server-notice")).to_be_hidden(timeout=15_000)
    expect(tab.page.locator(".assistant .body")).not_to_be_empty()
    tab.page.click("#stop")
    tab.wait_until_done()
    tab.forgive("503")


def test_too_long_a_prompt_says_so(tab: Tab) -> None:
    tab.ask("word " * 600)
    expect(tab.page.locator(".assistant .notice")).to_contain_text("maximum context length")
    tab.forgive("400")


def test_an_error_in_the_stream_is_shown_as_text(tab: Tab) -> None:
    error = 'data: {"error": {"message": "<img src=x onerror=alert(1)> failed"}}\n\n'
    body = stream([b"Some ", b"text"], ended=False) + error

    def answer(route: Route) -> None:
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    tab.page.route("**/v1/chat/completions", answer)
    tab.ask("Hello")
    expect(tab.page.locator(".assistant .body")).to_have_text("Some text")
    text = "<img src=x onerror=alert(1)> failed."
    expect(tab.page.locator(".assistant .notice")).to_have_text(text)
    expect(tab.page.locator("text=Go on")).to_be_visible()


def test_a_reload_in_the_middle_keeps_the_beginning(tab: Tab, server: RunningServer) -> None:
    tab.send("Hello")
    expect(tab.page.locator(".assistant .body")).not_to_be_empty()
    tab.page.wait_for_timeout(1500)  # it is saved each second
    tab.page.reload()
    expect(tab.page.locator(".assistant .body")).not_to_be_empty()
    expect(tab.page.locator(".assistant .notice")).to_contain_text("was closed during this answer")
    expect(tab.page.locator("text=Go on")).to_be_visible()
    engine = server.worker.llama.engine
    wait_for(lambda: engine.metrics().running == 0)
