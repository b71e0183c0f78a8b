"""A server in a thread of the test's process, on a free loopback port."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import openai
import torch

from llama import Llama
from llama.engine.request import Generation
from llama.engine.sampling import Sampling
from llama.server.app import make_app
from llama.server.serve import bound_socket, http_server
from llama.server.settings import ServerSettings
from llama.server.worker import Worker

NAME = "tiny"


class RunningServer:
    """Serves a model until `close`.

    Args:
        open_llama: builds the model, or returns one; the server does not close it.
        settings: of `ServerSettings`, without host and port.
    """

    def __init__(
        self,
        open_llama: Callable[[], Llama],
        defaults: Sampling | None = None,
        **settings: Any,
    ):
        self.settings = ServerSettings(port=0, **settings)
        self.defaults = defaults
        self._open = open_llama
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(30)

    def _run(self) -> None:
        with bound_socket(self.settings.host, 0) as sock:
            self.port = int(sock.getsockname()[1])
            asyncio.run(self._serve(sock))

    async def _serve(self, sock: socket.socket) -> None:
        self.loop = asyncio.get_running_loop()
        self.worker = Worker(self._open, self.settings.max_queue)
        app = make_app(self.worker, self.settings, self.defaults, NAME)
        self.server = http_server(app, self.settings)
        self.worker.start()
        self._started.set()
        await self.server.serve(sockets=[sock])
        self.worker.cancel_all()
        self.worker.end()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.worker.ended.wait(), 30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> RunningServer:
        """Wait until the model is built."""
        asyncio.run_coroutine_threadsafe(self.worker.loaded.wait(), self.loop).result(120)
        return self

    def http(self, **options: Any) -> httpx.Client:
        """A client whose paths are relative to the server."""
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def openai(self, key: str = "none") -> openai.OpenAI:
        """The official client, which checks the form of each response."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=key,
            max_retries=0,
            timeout=60,
            _strict_response_validation=True,
        )

    def close(self) -> None:
        """End, and wait for the end."""
        self.server.should_exit = True
        self._thread.join(60)
        assert not self._thread.is_alive()


@contextmanager
def slowed(llama: Llama, seconds: float, prefill_chunk: int = 512) -> Iterator[None]:
    """A block in which each step of a model takes `seconds` longer."""
    original, chunk = llama.model.hidden, llama.engine.prefill_chunk

    def hidden(*args: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(seconds)
        return original(*args, **kwargs)

    llama.model.hidden = hidden  # type: ignore[method-assign]
    llama.engine.prefill_chunk = prefill_chunk
    try:
        yield
    finally:
        llama.model.hidden = original  # type: ignore[method-assign]
        llama.engine.prefill_chunk = chunk


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def generations(server: RunningServer) -> list[Generation]:
    """What `server` works on."""
    tickets = list(server.worker._tickets)
    return [answer.generation for ticket in tickets for answer in ticket.answers]
