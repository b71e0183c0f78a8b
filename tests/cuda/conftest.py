"""Fixtures of the tests that need a GPU. LLAMA3_REHEARSE_CUDA=1 runs most of them on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from llama import Engine
from tests.cuda.cases import REHEARSING, make_engine


@pytest.fixture
def gpu_only() -> None:
    """For what only CUDA has: graphs, its memory, its synchronisation."""
    if REHEARSING:
        pytest.skip("about CUDA itself; a rehearsal cannot show it")


@pytest.fixture(scope="session")
def compiled() -> Engine:
    """An engine in fp32 with a compiled step; a test leaves no request in it."""
    return make_engine(compile=True)


@pytest.fixture(scope="module", params=["eager", "compiled"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """An eager engine, and the compiled one."""
    if request.param == "eager":
        yield make_engine()
    else:
        yield request.getfixturevalue("compiled")
