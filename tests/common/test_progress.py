"""progress.py: the items, with a bar unless the user has silenced the logger."""

from __future__ import annotations

import logging

import pytest
import tqdm

from llama.common.progress import progress


@pytest.mark.parametrize(("level", "shown"), [(logging.WARNING, True), (logging.ERROR, False)])
def test_bar_by_log_level(level: int, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar(tqdm.tqdm):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            bars.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    log = logging.getLogger("llama")
    previous = log.level
    log.setLevel(level)
    try:
        assert list(progress(range(3), "counting")) == [0, 1, 2]
    finally:
        log.setLevel(previous)
    assert bool(bars) == shown
