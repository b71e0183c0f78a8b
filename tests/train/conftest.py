"""Fixtures of the tests of training: a text, and a finished run."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama.train.pretraining import train
from tests.train.training import SMALL, write_text


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def full_run(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The folder of a run without interruption."""
    out = tmp_path_factory.mktemp("full_run") / "run"
    train(text, out, SMALL, device="cpu")
    return out
