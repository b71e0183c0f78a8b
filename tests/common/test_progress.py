"""progress.py: the items, with a bar unless the user has silenced the logger."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest
import tqdm

from llama.common.progress import progress, say


@pytest.mark.parametrize(("level", "shown"), [(logging.WARNING, True), (logging.ERROR, False)])
def test_bar_by_log_level(level: int, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    class Bar(tqdm.tqdm):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            bars.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log = logging.getLogger("llama")
    previous = log.level
    log.setLevel(level)
    try:
        assert list(progress(range(3), "counting")) == [0, 1, 2]
    finally:
        log.setLevel(previous)
    assert bool(bars) == shown


def test_a_file_gets_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No carriage returns, no escapes, nothing for short work."""
    clock = 0.0

    def work() -> Iterator[int]:
        nonlocal clock
        for i in range(100):
            clock += 1.0
            yield i

    monkeypatch.setattr("llama.common.progress.time.monotonic", lambda: clock)
    done = list(progress(work(), "read\x1b[2J", 100, " tensors", lambda: "loss 2.5"))
    assert done == list(range(100))
    err = capsys.readouterr().err
    assert err.splitlines()[0] == (
        r"read\x1b[2J: 10 of 100 tensors, 0:10 elapsed, 1:30 left, loss 2.5"
    )
    assert len(err.splitlines()) == 10 and "\r" not in err and "\x1b" not in err
    clock = 0.0
    assert len(list(progress(iter(range(1000)), "quick", 1000))) == 1000
    assert capsys.readouterr().err == ""


def test_samples_are_shown_by_any_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of training: a model may write anything, and stdout may be in any encoding."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    say("caf\xe9\x1b[2J")
    out.seek(0)
    assert out.read() == r"caf\xe9\x1b[2J" + "\n"
