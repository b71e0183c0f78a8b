"""What a damaged checkpoint may do: raise ValueError or OSError, soon, and in little memory."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, settings

from llama.checkpoints.inspect import describe
from llama.checkpoints.open import open_checkpoint, open_tokenizer
from llama.checkpoints.verify import verify
from tests.fuzz.bases import Files, write_base

CPU_SECONDS = 5.0  # of one file; a good one takes a fiftieth
MEMORY = 1 << 29  # bytes more than before
TEXT = "It's 12,345 words,\n\n   über \U0001f600 cats!"
# `LLAMA3_FUZZ=100000 pytest tests/fuzz` tries as many files in each test, other ones each time.
EXAMPLES = int(os.environ.get("LLAMA3_FUZZ", "0"))


def fuzzing(examples: int) -> settings:
    """`examples` inputs, the same in every run."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


class OutOfBoundsError(BaseException):
    """Passes every `except Exception`."""


@contextmanager
def bounds() -> Iterator[None]:
    """A block of at most CPU_SECONDS and MEMORY."""

    def stop(number: int, frame: object) -> None:
        raise OutOfBoundsError(f"more than {CPU_SECONDS} seconds")

    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGPROF, stop)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def read_files(files: Files) -> None:
    """`read_all` of a folder with these files."""
    with tempfile.TemporaryDirectory() as temporary:
        read_all(write_base(Path(temporary) / "fuzzed-model", files))


def read_all(path: Path) -> None:
    """Read a checkpoint as build, inspect and verify do, within bounds.

    Whatever it contains, errors are ValueErrors and OSErrors that name it.
    """
    with bounds(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in (_build, _verify):
            try:
                step(path)
            except (ValueError, OSError) as e:
                assert len(str(e)) < 3000 or isinstance(e, OSError), "a message of many pages"
                assert path.name in str(e), f"the message does not name the file: {e!r}"


def _build(path: Path) -> None:
    source = open_checkpoint(path)
    source.args(max_seq_len=8, max_batch_size=1)
    describe(source)
    for name in source.shapes():
        source.read(name)
    tokenizer = open_tokenizer(source)
    try:
        ids = tokenizer.encode(TEXT, bos=True, eos=True)
    except ValueError:
        return  # the vocabulary lacks a character: the message names it, not the file
    tokenizer.decode(ids)


def _verify(path: Path) -> None:
    for problem in verify(path, open_checkpoint):
        assert str(path) in problem, problem
        assert "Error:" not in problem or "(" in problem, problem
