"""`Llama` as an object: closing, memory, messages, and the types of its options."""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import multiprocessing
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from llama import Llama, Request, Sampling, Transformer
from llama.engine.compiled_step import CompiledStep
from llama.generation import (
    BuildOptions,
    GenerationOptions,
    MoreBuildOptions,
    MoreOptions,
    StreamOptions,
)

Build = Callable[..., Llama]
META_BUILD = {"max_seq_len", "max_batch_size", "model_parallel_size", "seed"}


@pytest.fixture(scope="module")
def build(folder: Path, byte_tokenizer_path: Path) -> Build:
    """Build a small model: `build(dtype="bf16", ...)`."""

    def build(**options: Any) -> Llama:
        options = {"device": "cpu", "dtype": "fp32"} | options
        return Llama.build(folder, byte_tokenizer_path, 64, 3, **options)

    return build


@contextmanager
def no_gc() -> Iterator[None]:
    """Only reference counts free memory in this block."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def memory_of(llama: Llama) -> list[weakref.ref[torch.Tensor]]:
    """Weak references to two weights and a tensor of the KV cache."""
    weights = dict(llama.model.named_parameters(remove_duplicate=False))
    names = ("layers.0.attention_norm.weight", "tok_embeddings.weight")
    return [weakref.ref(t) for t in (*(weights[n] for n in names), llama.engine.cache[0].k)]


def assert_freed(references: list[weakref.ref[torch.Tensor]]) -> None:
    assert [reference() for reference in references] == [None] * len(references)


def test_repr_is_one_short_line(build: Build) -> None:
    text = repr(build())
    assert "\n" not in text and len(text) < 160
    assert text == (
        "Llama(dim=64, n_layers=2, n_heads=4, vocab_size=512, max_seq_len=64, max_batch_size=3, "
        "dtype=float32, device=cpu, ranks=1)"
    )


@pytest.mark.parametrize("how", ["close", "with", "del"])
@pytest.mark.parametrize("options", [{}, {"exact": True}, {"quantize": "int8"}], ids=str)
def test_memory_is_freed_without_the_garbage_collector(
    build: Build, how: str, options: dict[str, Any]
) -> None:
    llama = build(**options)
    references = memory_of(llama)
    with no_gc():
        llama.generate([[1, 2, 3], [4]], 3)
        llama.text_completion(["Hello"], max_gen_len=3, logprobs=True, echo=True)
        llama.chat_completion([[{"role": "user", "content": "Hi"}]], max_gen_len=3, stop=["x"])
        llama.score(["some text"])
        list(llama.text_stream("Hello", max_gen_len=3))
        if how == "close":
            llama.close()
            llama.close()
        elif how == "with":
            with llama as same:
                assert same is llama
            del same
        else:
            del llama
        assert_freed(references)


@pytest.mark.parametrize("how", ["close", "del"])
def test_memory_is_freed_after_a_stream_that_was_not_read_to_its_end(
    build: Build, how: str
) -> None:
    llama = build()
    references = memory_of(llama)
    with no_gc():
        stream = llama.text_stream("Hello", temperature=0)
        next(stream)
        if how == "close":  # the stream is still there
            llama.close()
            assert_freed(references)
            assert [piece.finish_reason for piece in stream] == ["cancelled"]
        else:
            del stream, llama
            assert_freed(references)


@pytest.mark.parametrize("how", ["close", "del"])
def test_memory_is_freed_after_errors(
    build: Build, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: object, **kwargs: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory left")

    llama = build()
    references = memory_of(llama)
    with no_gc():
        with pytest.raises(ValueError, match="is empty"):
            llama.generate([[]], 1)
        with pytest.warns(UserWarning, match="prompt 1 is empty"):
            llama.generate([[1], []], 1)
        with monkeypatch.context() as patch:
            patch.setattr(Transformer, "hidden", failing)
            with pytest.raises(torch.OutOfMemoryError):
                llama.generate([[1, 2]], 3)
            if how == "close":  # a stream keeps its error, whose traceback names the stream
                with pytest.raises(torch.OutOfMemoryError):
                    list(llama.text_stream("Hello"))
        if how == "close":
            llama.close()
        del llama
        assert_freed(references)


def test_a_compiled_step_is_freed_with_its_engine(build: Build) -> None:
    """Without compiling; compiled_decoding.py checks it with compiled code."""
    llama = build()
    references = memory_of(llama)
    with no_gc():
        llama.engine.compiled = CompiledStep(llama.model, llama.engine.cache)
        del llama
        assert_freed(references)


def test_use_after_close_says_what_to_do(build: Build) -> None:
    llama = build()
    engine, request = llama.engine, Request([1])
    unread = llama.text_stream("Hello")
    with llama:
        pass
    assert repr(llama) == "Llama(closed)"
    calls: list[Callable[[], object]] = [
        lambda: llama.model,
        lambda: llama.engine,
        lambda: llama.generate([[1]], 1),
        lambda: llama.text_completion(["a"]),
        lambda: llama.chat_completion([[{"role": "user", "content": "a"}]]),
        lambda: llama.text_stream("a"),
        lambda: llama.chat_stream([{"role": "user", "content": "a"}]),
        lambda: llama.score(["a"]),
        lambda: llama.perplexity("a text"),
    ]
    for call in calls:
        with pytest.raises(AttributeError, match="this Llama is closed; build another"):
            call()
    refused: list[Callable[[], object]] = [lambda: engine.add(request), lambda: next(unread)]
    for call in refused:
        with pytest.raises(RuntimeError, match="this engine is closed; build another Llama"):
            call()
    with pytest.raises(AttributeError, match=r"Llama has no attribute 'modle'$"):
        getattr(llama, "modle")  # noqa: B009


def test_messages_can_be_silenced(folder: Path, byte_tokenizer_path: Path, tmp_path: Path) -> None:
    """Nothing is printed; messages and warnings go through the logger "llama"."""
    code = """
import json, logging, sys
from llama import Llama
logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
logger = logging.getLogger("llama")
for level in (logging.ERROR, logging.INFO):
    logger.setLevel(level)
    print("level", level, file=sys.stderr)
    Llama.build(sys.argv[1], sys.argv[2], 64, 1, device="cpu", dtype="fp32").generate([[1]], 1)
"""
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CXX": "false"}
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(byte_tokenizer_path)],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr
    silent, _, spoken = done.stderr.partition("level 20\n")
    assert silent == "level 40\n"
    assert spoken and all(line.startswith("llama: ") for line in spoken.splitlines())


def test_an_unknown_keyword_is_named(build: Build) -> None:
    with pytest.raises(TypeError, match="'modle_parallel_size'"):
        build(modle_parallel_size=1)
    llama = build()
    dialog: Any = [{"role": "user", "content": "a"}]
    calls: list[Callable[..., object]] = [
        lambda **more: llama.generate([[1]], 1, **more),
        lambda **more: llama.text_completion(["a"], **more),
        lambda **more: llama.chat_completion([dialog], **more),
        lambda **more: llama.text_stream("a", **more),
        lambda **more: llama.chat_stream(dialog, **more),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"^unknown argument 'temprature'; did you mean 'temp"):
            call(temprature=0.5)
        with pytest.raises(TypeError, match=r"'zzz'; use some of \["):
            call(zzz=1)


def test_copies_say_what_to_do(build: Build) -> None:
    llama = build()
    for what in (llama, llama.engine, llama.text_stream("a")):
        for duplicate in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=f"a {type(what).__name__} cannot be copied"):
                duplicate(what)
    process = multiprocessing.get_context("spawn").Process(target=print, args=(llama,))
    with pytest.raises(TypeError, match=r"a new process calls Llama\.build itself"):
        process.start()


def test_one_where_a_list_is_needed(build: Build) -> None:
    llama, message = build(), {"role": "user", "content": "Hi"}
    calls: dict[str, Callable[[], object]] = {
        r"give \[dialog\]": lambda: llama.chat_completion([message]),  # type: ignore[list-item]
        r"one dialog give": lambda: llama.chat_completion(message),  # type: ignore[arg-type]
        r"give \[message\]": lambda: llama.chat_stream(message),  # type: ignore[arg-type]
        r"give \[text\]": lambda: llama.text_completion("Hi"),
        r"give \[prompt\]": lambda: llama.generate([1, 2], 1),  # type: ignore[list-item]
    }
    for remedy, call in calls.items():
        with pytest.raises(TypeError, match=remedy):
            call()


def test_typed_keywords_are_the_fields_of_the_options() -> None:
    fields = get_type_hints(BuildOptions)
    assert get_type_hints(MoreBuildOptions) == {
        name: kind for name, kind in fields.items() if name not in META_BUILD
    }
    assert fields.keys() > META_BUILD
    assert get_type_hints(MoreOptions) == get_type_hints(GenerationOptions)
    completion = get_type_hints(Llama.text_completion)
    common = {k: v for k, v in completion.items() if k not in ("prompts", "echo", "more", "return")}
    assert get_type_hints(StreamOptions) == common | get_type_hints(MoreOptions)


def defaults(function: Callable[..., object]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def test_defaults_of_signatures_are_those_of_the_options() -> None:
    assert defaults(Llama.build) == {
        "tokenizer_path": None,
        "max_seq_len": BuildOptions.max_seq_len,
        "max_batch_size": BuildOptions.max_batch_size,
        "model_parallel_size": BuildOptions.model_parallel_size,
        "seed": BuildOptions.seed,
    }
    order = "ckpt_dir tokenizer_path max_seq_len max_batch_size model_parallel_size seed"  # Meta's
    assert list(inspect.signature(Llama.build).parameters)[:6] == order.split()
    sampling = {"temperature": Sampling.temperature, "top_p": Sampling.top_p}
    assert (GenerationOptions.top_k, GenerationOptions.min_p) == (Sampling.top_k, Sampling.min_p)
    for function in (Llama.generate, Llama.text_completion, Llama.chat_completion, Llama._stream):
        found = defaults(function)
        assert found.items() >= sampling.items()
        assert found["logprobs"] is Request.logprobs
        if function is not Llama.generate:
            assert found["max_gen_len"] is Request.max_gen_len
        assert not found.keys() & get_type_hints(MoreOptions).keys()


def test_generate_needs_no_text_of_its_ids(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a model has more rows than its tokenizer has tokens."""
    llama = build()

    def lacking(ids: list[int]) -> bytes:
        raise ValueError(f"no token has the id {ids[0]}")

    want = llama.generate([[1, 2, 3]], 5, temperature=0)
    monkeypatch.setattr(llama.tokenizer, "decode_bytes", lacking)
    assert llama.generate([[1, 2, 3]], 5, temperature=0) == want
    with pytest.raises(ValueError, match="no token has the id"):
        llama.generate([[1, 2, 3]], 5, temperature=0, stop=["x"])


def test_every_field_of_sampling_reaches_the_engine() -> None:
    names = [f.name for f in dataclasses.fields(Sampling)]
    values: dict[str, Any] = {"temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.5}
    values |= {"presence_penalty": 0.5, "frequency_penalty": -0.5}
    assert names == list(values), "give the new field a value that is not its default"
    rest = {name: value for name, value in values.items() if name not in ("temperature", "top_p")}
    assert GenerationOptions(**rest).sampling(0.5, 0.5) == Sampling(**values)
