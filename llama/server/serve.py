"""Listens, loads the model, answers until a signal comes or the model fails."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from llama.common.extras import install_line
from llama.distributed import job
from llama.engine.sampling import Sampling
from llama.generation import Llama
from llama.server.models import served_names
from llama.server.ranks import follow
from llama.server.settings import KEEP_ALIVE, KEY_VARIABLE, ServerSettings
from llama.server.worker import Worker

if TYPE_CHECKING:
    import uvicorn
    from starlette.applications import Starlette

log = logging.getLogger("llama")
STEP_ENDS_WITHIN = 10.0  # seconds for the last step, after its requests have been cancelled
CLOSES_WITHIN = 2  # seconds for clients to take the rest of their responses
FAILURE_SHOWN = 1.0  # seconds in which /health tells of a failed model before the process ends
MORE_CONNECTIONS = 256  # beside those of requests that wait: running ones, idle browsers
MAX_HEAD = 65_536  # bytes of a request's line and headers


def serve(
    settings: ServerSettings,
    open_llama: Callable[[], Llama],
    defaults: Sampling | None = None,
    model: str = "llama3",
) -> None:
    """Answer requests until SIGINT or SIGTERM. With several ranks, rank 0 listens.

    Args:
        open_llama: builds the model, in a thread. Requests are refused until it returns.
        defaults, model: see `llama.server.app.Service`.

    Raises:
        ValueError: it cannot listen there.
        ImportError: packages of the extra are missing.
        Exception: the model could not be loaded, or failed.
    """
    check_packages()
    if not job.is_leader():
        llama = open_llama()
        for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 says when to end
            signal.signal(number, signal.SIG_IGN)
        follow(llama.engine)
        return
    with bound_socket(settings.host, settings.port) as sock:
        server = _Server(settings, sock, Worker(open_llama, settings.max_queue))
        asyncio.run(server.run(defaults, model))
    error = server.worker.error
    if error is not None:
        raise error
    if not server.worker.ended.is_set():  # it still loads, or hangs in a step
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def check_packages() -> None:
    """Raise an ImportError, with what to install, if a package of the extra is missing."""
    try:
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as e:
        raise ImportError(f"the server needs {e.name}: {install_line('serve')}") from None


@contextlib.contextmanager
def bound_socket(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens.

    Raises:
        ValueError: no such address here, or another program listens there; says what to do.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise ValueError(
            f"--host {host} is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all"
        ) from None
    family, kind, protocol, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    with socket.socket(family, kind, protocol) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
            sock.listen(1024)
        except OSError as e:
            raise ValueError(_cannot_listen(e, host, port)) from None
        yield sock


def _cannot_listen(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"another program listens on port {port}; end it, or choose another --port"
    if error.errno == errno.EACCES:
        return f"no permission for port {port}; choose a --port above 1023"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host} is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all"
    return f"cannot listen on {host} port {port}: {error.strerror}"


def http_server(app: Starlette, settings: ServerSettings) -> uvicorn.Server:
    """uvicorn with our limits. It leaves signals alone."""
    import uvicorn

    from llama.server.connections import TimedConnection

    config = uvicorn.Config(
        app,
        http=partial(  # type: ignore[arg-type]
            TimedConnection,
            receive_timeout=settings.receive_timeout,
            send_timeout=settings.request_timeout,
            most=settings.max_queue + MORE_CONNECTIONS,
        ),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",  # the guard writes the log
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=CLOSES_WITHIN,
        h11_max_incomplete_event_size=MAX_HEAD,
    )
    server = uvicorn.Server(config)
    setattr(server, "capture_signals", contextlib.nullcontext)  # noqa: B010 - mypy
    return server


class _Server:
    """uvicorn, the worker, and what a signal does to them."""

    def __init__(self, settings: ServerSettings, sock: socket.socket, worker: Worker):
        self.settings, self.sock, self.worker = settings, sock, worker
        self._stop = asyncio.Event()

    async def run(self, defaults: Sampling | None, model: str) -> None:
        from llama.server.app import make_app

        app = make_app(self.worker, self.settings, defaults, model)
        server = http_server(app, self.settings)
        self._catch_signals()
        self._warn_of_open_door()
        log.info("Listening on %s; loading the model", self.url)
        self.worker.start()
        serving = asyncio.create_task(server.serve(sockets=[self.sock]))
        announcing = asyncio.create_task(self._announce(model))
        await self._until_end()
        announcing.cancel()
        server.should_exit = True
        await serving

    @property
    def url(self) -> str:
        host, port = self.sock.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    async def _announce(self, model: str) -> None:
        await self.worker.loaded.wait()
        names = served_names(self.worker.llama, model)
        who = f"{', '.join(names)} answer{'s' * (len(names) == 1)}"
        print(f"{who} at {self.url} (OpenAI clients: {self.url}/v1)", flush=True)

    def _warn_of_open_door(self) -> None:
        if self.settings.is_open_to_others:
            log.warning(
                "Other machines can reach this server and need no key; set %s, or listen on "
                "127.0.0.1",
                KEY_VARIABLE,
            )

    def _catch_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        """Begin to stop; at the second signal end at once.

        Under torchrun a rank may receive both the terminal's signal and the launcher's.
        """
        if not self._stop.is_set():
            self._stop.set()
        elif not job.is_launched():
            os._exit(128 + number)

    async def _until_end(self) -> None:
        """Wait for a signal or the worker's failure, and let what runs end."""
        worker, stopped = self.worker, asyncio.ensure_future(self._stop.wait())
        failed = asyncio.ensure_future(worker.ended.wait())
        await asyncio.wait([stopped, failed], return_when=asyncio.FIRST_COMPLETED)
        if worker.state == "dead":
            if worker.loaded.is_set():
                await asyncio.sleep(FAILURE_SHOWN)
            return
        worker.refuse()
        if worker.running:
            log.info(
                "Stopping; %d running, which have %g s to end; another signal ends them now",
                worker.running,
                self.settings.grace,
            )
        await worker.wait_until_idle(self.settings.grace)
        worker.cancel_all()
        worker.end()
        if worker.loaded.is_set():
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(failed, STEP_ENDS_WITHIN)
