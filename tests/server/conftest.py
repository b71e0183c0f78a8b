"""Servers on free loopback ports: over a tiny random model, and over the demo model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from llama import Llama
from tests.server.running import RunningServer


@pytest.fixture(scope="session")
def tiny_llama(tiny_checkpoint: Callable[..., Path], llama3_tokenizer_path: Path) -> Llama:
    """Random weights with the vocabulary and the chat format of Llama 3.1: 4 slots of 512."""
    folder = tiny_checkpoint(use_scaled_rope=True)
    return Llama.build(
        folder, llama3_tokenizer_path, 512, 4, device="cpu", dtype=torch.float32, exact=True
    )


@pytest.fixture(scope="session")
def server(tiny_llama: Llama) -> Iterator[RunningServer]:
    """A server over `tiny_llama` with the default settings; tests leave nothing running."""
    running = RunningServer(lambda: tiny_llama).wait_until_ready()
    yield running
    running.close()


@pytest.fixture
def start_server(tiny_llama: Llama) -> Iterator[Callable[..., RunningServer]]:
    """Starts a server with settings of the test's own, over `tiny_llama` or another model.

    `tiny_llama` serves one at a time: a test uses this or `server`.
    """
    started: list[RunningServer] = []

    def start(open_llama: Callable[[], Llama] | None = None, **settings: Any) -> RunningServer:
        started.append(RunningServer(open_llama or (lambda: tiny_llama), **settings))
        return started[-1]

    yield start
    for running in started:
        running.close()


@pytest.fixture(scope="session")
def demo_server(demo: Llama) -> Iterator[RunningServer]:
    """A server over the demo model in float32: 8 slots of 256."""
    running = RunningServer(lambda: demo).wait_until_ready()
    yield running
    running.close()


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    """The official client of `server`, strict."""
    return server.openai()


@pytest.fixture
def demo_client(demo_server: RunningServer) -> openai.OpenAI:
    """The official client of `demo_server`, strict."""
    return demo_server.openai()
