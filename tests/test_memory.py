"""Memory comes back when the last reference goes, without the garbage collector."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama, Piece, Request, Stream
from llama.common.errors import without_frames

CODE = """
import gc, sys, weakref
from llama import Llama

gc.collect()
gc.disable()


def use(llama):
    llama.generate([[1, 2], [3]], 3, seed=1)
    list(llama.text_stream("Hello", max_gen_len=3))
    next(llama.text_stream("Hello"))
    try:
        llama.text_completion([""])
    except ValueError:
        pass


models = []
for more in ({}, {"quantize": "int8"}, {"exact": True}, {"dtype": "bf16"}, {}):
    more = {"device": "cpu", "dtype": "fp32"} | more
    llama = Llama.build(sys.argv[1], sys.argv[2], 64, 1, **more)
    use(llama)
    models += [weakref.ref(llama.model), weakref.ref(llama.engine.cache[0].k)]
    print(sum(model() is not None for model in models))
del llama
print(sum(model() is not None for model in models))
"""


@pytest.fixture
def build(folder: Path, byte_tokenizer_path: Path) -> Callable[[], Llama]:
    return lambda: Llama.build(folder, byte_tokenizer_path, 64, 2, device="cpu", dtype="fp32")


@pytest.fixture(autouse=True)
def no_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def memory_of(llama: Llama) -> list[weakref.ref[Any]]:
    return [weakref.ref(llama.model), weakref.ref(llama.engine.cache[0].k)]


def is_freed(references: list[weakref.ref[Any]]) -> bool:
    return [reference() for reference in references] == [None] * len(references)


def test_builds_in_a_row_hold_one_model(folder: Path, byte_tokenizer_path: Path) -> None:
    """In a new process: what torch imports at its first use keeps the frames of its callers."""
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(folder), str(byte_tokenizer_path)],
        env={**os.environ, "PYTHONPATH": str(root), "LLAMA3_KERNELS": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # While a build runs, `llama` is still the one before; after it, that one is freed.
    assert done.stdout.split() == ["2"] * 5 + ["0"]


def fail_in_steps(llama: Llama) -> None:
    with torch.no_grad():
        llama.model.norm.weight[:] = float("nan")


def fail_in_text(llama: Llama) -> None:
    """Every id is drawn, and the tokenizer lacks all of them."""
    llama.tokenizer.decode_bytes = no_bytes  # type: ignore[method-assign,assignment]


def no_bytes(ids: object) -> bytes:
    try:
        return {}[ids]  # type: ignore[index]
    except (KeyError, TypeError) as e:
        raise ValueError("no such token") from e


def read(stream: Stream) -> list[Piece]:
    return list(stream)


@pytest.mark.parametrize("how", ["to its end", "closed", "failed step", "failed text"])
def test_a_stream_that_is_over_keeps_no_model(build: Callable[[], Llama], how: str) -> None:
    llama = build()
    references = memory_of(llama)
    if how.startswith("failed"):
        (fail_in_steps if how == "failed step" else fail_in_text)(llama)
    stream = llama.text_stream("Hello", max_gen_len=5)
    if how == "to its end":
        assert read(stream)[-1].finish_reason
    elif how == "closed":
        next(stream)
        stream.close()
    else:
        with pytest.raises(ValueError, match=r"not a number|no such token"):
            read(stream)
    del llama
    assert is_freed(references)
    assert list(stream) == []


def test_an_error_does_not_keep_its_callers(build: Callable[[], Llama]) -> None:
    """The model and the stream are locals of the function that the error passes through."""
    references = []

    def generate(fail: Callable[[Llama], None]) -> None:
        llama = build()
        references.extend(memory_of(llama))
        fail(llama)
        stream = llama.text_stream("Hello")
        for _ in stream:
            pass

    for fail in (fail_in_steps, fail_in_text):
        with pytest.raises(ValueError, match=r"not a number|no such token"):
            generate(fail)
        assert is_freed(references)


def test_a_failed_generation_that_is_kept_holds_no_model(build: Callable[[], Llama]) -> None:
    """Neither its error nor what caused it keeps the frames of the step."""

    def failing(tokens: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        try:
            return tokens[len(tokens)]
        except IndexError as e:
            raise RuntimeError("a kernel failed") from e

    llama = build()
    references = memory_of(llama)
    llama.model.hidden = failing  # type: ignore[method-assign]
    [generation] = llama.engine.run([Request([1, 2], 3)])
    assert isinstance(generation.error, RuntimeError)
    assert isinstance(generation.error.__cause__, IndexError)
    llama.model.hidden = None  # type: ignore[method-assign,assignment]
    del failing, llama
    assert is_freed(references)


def test_without_frames_follows_causes_and_ends() -> None:
    a, b = ValueError("a"), KeyError("b")
    a.__context__, b.__context__ = b, a
    try:
        raise a
    except ValueError:
        pass
    assert without_frames(a) is a
    assert a.__traceback__ is None and b.__traceback__ is None
