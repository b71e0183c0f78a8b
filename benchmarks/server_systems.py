"""The systems that `benchmarks.server` measures: the bare engine, `llama3 serve`, llama-server.

Each works only while one of its methods is called: they share the processors.
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.bare_engine import BareEngine
from benchmarks.llama_cpp_peer import write_gguf
from benchmarks.random_checkpoint import SHAPES, RandomSource, write_rank_file
from benchmarks.server_clients import ServerClients
from benchmarks.server_processes import (
    ServerProcess,
    free_port,
    llama_cpp_command,
    our_command,
)
from benchmarks.workers import Worker
from llama import ensure_demo_model
from llama.checkpoints.formats.meta_export import write_meta
from llama.checkpoints.open import open_checkpoint, open_tokenizer
from llama.commands.waiting import SETTINGS, SPINS

ENGINE, OURS, LLAMA_CPP = "engine alone", "llama3 serve", "llama-server"


class System(Protocol):
    def call(self, method: str, *args: Any) -> Any: ...


class Served:
    """A server and its clients, both paused between the calls."""

    def __init__(self, server: ServerProcess, clients: Worker):
        self.server, self.clients = server, clients

    def call(self, method: str, *args: Any) -> Any:
        self.server.resume()
        try:
            return self.clients.call(method, *args)
        finally:
            self.server.pause()


@contextmanager
def start_served(name: str, command: list[str], port: int, log: Path) -> Iterator[Served]:
    """A server that is ready, and its clients."""
    with (
        ServerProcess(name, command, port, log) as server,
        Worker(f"the clients of {name}", ServerClients, port) as clients,
    ):
        server.pause()
        yield Served(server, clients)


@contextmanager
def threads_that_wait_as_in_commands() -> Iterator[None]:
    """Processes that start in this block wait as `llama3`'s do; see `llama.commands.waiting`."""
    unset = not any(name in os.environ for name in SETTINGS)
    if unset:
        os.environ["GOMP_SPINCOUNT"] = SPINS
    try:
        yield
    finally:
        if unset:
            del os.environ["GOMP_SPINCOUNT"]


@contextmanager
def start_systems(
    ckpt_dir: str, rows: int, length: int, llama_server: str | None, folder: Path
) -> Iterator[dict[str, System]]:
    """The systems by name, on the same weights.

    Args:
        rows, length: of the KV cache.
        llama_server: llama.cpp's binary; None measures without it.
        folder: for logs and llama.cpp's file.
    """
    with ExitStack() as stack:
        systems: dict[str, System] = {}
        with threads_that_wait_as_in_commands():
            engine = stack.enter_context(Worker(ENGINE, BareEngine, ckpt_dir, rows, length))
            engine.call("ready")
        systems[ENGINE] = engine
        port = free_port()
        command = our_command(ckpt_dir, rows, length, port)
        log = folder / "llama3-serve.log"
        systems[OURS] = stack.enter_context(start_served(OURS, command, port, log))
        if llama_server is not None:
            gguf, port = folder / "weights.gguf", free_port()
            source = open_checkpoint(ckpt_dir)
            write_gguf(source, gguf, "bfloat16", open_tokenizer(source))
            command = llama_cpp_command(llama_server, gguf, rows, length, port)
            log = folder / "llama-server.log"
            systems[LLAMA_CPP] = stack.enter_context(start_served(LLAMA_CPP, command, port, log))
        yield systems


def checkpoint(shape: str, folder: Path) -> str:
    """The demo model's folder, or that of a random checkpoint which is written now."""
    if shape == "demo":
        return str(ensure_demo_model())
    params = SHAPES[shape]
    ckpt_dir = folder / shape
    ckpt_dir.mkdir()
    write_meta(RandomSource(params), None, ckpt_dir, torch.bfloat16)
    write_rank_file(
        ckpt_dir / "tokenizer.model", params["vocab_size"], string.ascii_lowercase.encode()
    )
    return str(ckpt_dir)
