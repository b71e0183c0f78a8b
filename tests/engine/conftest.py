"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest

from llama.model import Transformer
from tests.engine.cases import make_model


@pytest.fixture(scope="module")
def model() -> Transformer:
    """A small model with random weights; do not change it."""
    return make_model()
