"""Streams: their pieces make up the completion and never end inside a character or stop string."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.text.detokenizer import Detokenizer
from llama.tokenizer import Tokenizer

ALPHABET = "abc déß漢字😀👩‍👩‍👧\n."


@pytest.fixture(scope="module")
def tokenizer(llama3_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(llama3_tokenizer_path)


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Callable[..., Path], llama3_tokenizer_path: Path) -> Llama:
    folder = tiny_checkpoint()
    return Llama.build(folder, llama3_tokenizer_path, 64, 4, device="cpu", dtype=torch.float32)


def feed(
    tokenizer: Tokenizer, ids: list[int], stop: list[str], cut: bool = False
) -> tuple[str, str | None]:
    """(text, finish reason) of a row of these ids, fed one at a time as by the engine."""
    detokenizer, text = Detokenizer(tokenizer.decode_bytes, stop), ""
    for i, token in enumerate(ids):
        new = detokenizer.feed([token], last=i == len(ids) - 1)
        text += new
        assert cut or "\ufffd" not in new
        if detokenizer.stopped:
            assert detokenizer.used == i + 1
            assert detokenizer.feed(ids) == "" and detokenizer.used == i + 1
            return text, "stop"
    at_once = Detokenizer(tokenizer.decode_bytes, stop)
    assert at_once.feed(ids, last=True) == text and at_once.used == len(ids)
    return text, "length"


def random_pieces(rng: random.Random, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """A text and ids that split it at any byte, also inside characters."""
    text = "".join(rng.choices(ALPHABET, k=rng.randint(1, 30)))
    data, ids = text.encode(), []
    while data:
        n = rng.randint(1, 5)
        ids += tokenizer.model._encode_bytes(data[:n]) if n > 1 else [tokenizer.ranks[data[:1]]]
        data = data[n:]
    return text, ids


def test_200_streams_equal_their_text_up_to_the_first_stop_string(tokenizer: Tokenizer) -> None:
    rng, stopped = random.Random(0), 0
    for _ in range(200):
        text, ids = random_pieces(rng, tokenizer)
        assert feed(tokenizer, ids, []) == (text, "length")
        stop = ["".join(rng.choices(ALPHABET, k=rng.randint(1, 4))) for _ in range(3)]
        if len(text) > 6:
            at = rng.randrange(len(text) - 3)
            stop.append(text[at : at + 3])
        cut = min((at for s in stop if (at := text.find(s)) >= 0), default=None)
        got, reason = feed(tokenizer, ids, stop)
        if cut is None:
            assert (got, reason) == (text, "length")
        else:
            stopped += 1
            # The first complete stop string ends the row; text returned before does not overlap it.
            assert reason == "stop" and text.startswith(got)
            assert not any(s in got for s in stop)
            assert any(text[len(got) :].startswith(s) for s in stop)
    assert stopped > 100


def test_incomplete_character_at_the_end(tokenizer: Tokenizer) -> None:
    half = [tokenizer.ranks[bytes([b])] for b in "é".encode()[:1]]
    assert feed(tokenizer, [*tokenizer.encode("a", bos=False, eos=False), *half], [], True) == (
        "a\ufffd",
        "length",
    )


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 3, "temperature": 1.0}])
def test_stream_is_the_completion(tiny: Llama, options: dict[str, Any]) -> None:
    [whole] = tiny.text_completion(["Hello"], max_gen_len=30, logprobs=True, **options)
    pieces = list(tiny.text_stream("Hello", max_gen_len=30, logprobs=True, **options))
    assert "".join(p.text for p in pieces) == whole["generation"]
    tokens = [t for p in pieces for t in p.tokens]
    assert [tiny.tokenizer.decode([t]) for t in tokens] == whole["tokens"]
    assert [x for p in pieces for x in p.logprobs] == pytest.approx(whole["logprobs"], abs=1e-4)
    assert [p.finish_reason for p in pieces] == [None] * 29 + ["length"]


def test_stop_string_of_a_completion(tiny: Llama) -> None:
    [free] = tiny.text_completion(["Hello"], temperature=0, max_gen_len=20)
    stop = free["generation"][10:14]
    before = free["generation"][: free["generation"].find(stop)]
    options: dict[str, Any] = {"temperature": 0, "max_gen_len": 20, "stop": [stop]}
    results = tiny.text_completion(["Hello", "Other text"], **options)
    assert results[0] == {"generation": before, "finish_reason": "stop"}
    assert results[1] == tiny.text_completion(["Other text"], **options)[0]
    assert "".join(p.text for p in tiny.text_stream("Hello", **options)) == before


def test_chat_stream_of_the_demo_model(demo: Llama) -> None:
    dialog: Any = [{"role": "user", "content": "What is the capital of France?"}]
    [whole] = demo.chat_completion([dialog], temperature=0, max_gen_len=20)
    pieces = list(demo.chat_stream(dialog, temperature=0, max_gen_len=20))
    assert "".join(p.text for p in pieces) == whole["generation"]["content"]
    assert pieces[-1].finish_reason == whole["finish_reason"]
    assert "Paris" in whole["generation"]["content"]


def test_streams_beside_each_other(tiny: Llama) -> None:
    """In one thread: each step advances all streams that have begun, and a batch among them."""
    texts = [f"Text {i}" for i in range(6)]  # there are four slots
    want = tiny.text_completion(texts, temperature=0, max_gen_len=12)
    streams = [tiny.text_stream(text, temperature=0, max_gen_len=12) for text in texts]
    got = [next(stream).text for stream in streams[:3]]
    assert tiny.text_completion(texts[3:], temperature=0, max_gen_len=12) == want[3:]
    for i, stream in enumerate(streams[:3]):
        got[i] += "".join(piece.text for piece in stream)
        assert got[i] == want[i]["generation"]


def test_streams_in_threads(tiny: Llama) -> None:
    texts = [f"Text {i}" for i in range(8)]
    want = [p["generation"] for p in tiny.text_completion(texts, temperature=0, max_gen_len=12)]
    got = [""] * len(texts)

    def read(i: int) -> None:
        for piece in tiny.text_stream(texts[i], temperature=0, max_gen_len=12):
            got[i] += piece.text

    threads = [threading.Thread(target=read, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert got == want


@pytest.mark.parametrize("how", ["close", "with", "del"])
def test_an_abandoned_stream_frees_its_slot(tiny: Llama, how: str) -> None:
    stream = tiny.text_stream("Hello", temperature=0)
    next(stream)
    generation = stream.generation
    assert tiny.engine.busy and generation is not None
    if how == "close":
        stream.close()
    elif how == "with":
        with stream:
            pass
    else:
        del stream
        gc.collect()
    assert not tiny.engine.busy and generation.finish_reason == "cancelled"
    assert tiny.generate([[1, 2]] * 4, 2, temperature=0)[0]


def test_a_stream_reports_what_it_reused(tiny: Llama) -> None:
    tiny.engine.forget()
    for text, reused in [("One two three four", 0), ("One two three five", 4)]:
        stream = tiny.text_stream(text, temperature=0, max_gen_len=2)
        assert len(list(stream)) == 2 and stream.generation is not None
        assert stream.generation.reused == reused


def test_a_token_without_text_ends_its_own_stream(
    tiny: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such ids exist if a model's vocabulary is larger than its tokenizer's."""
    decode = tiny.tokenizer.decode_bytes
    [want] = tiny.text_completion(["Hello"], temperature=0, max_gen_len=6)

    def lacking(ids: list[int]) -> bytes:
        if 128000 in ids:
            raise ValueError("no token has the id 128000")
        return decode(ids)

    monkeypatch.setattr(tiny.tokenizer, "decode_bytes", lacking)
    other = tiny.text_stream("Hello", temperature=0, max_gen_len=6)
    stream = tiny.text_stream("Hi", temperature=0, max_gen_len=6)
    text = next(other).text
    next(stream)
    stream.generation.tokens.append(128000)
    with pytest.raises(ValueError, match="no token has the id 128000"):
        list(stream)
    assert text + "".join(piece.text for piece in other) == want["generation"]


def test_an_error_of_the_engine_is_raised(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = tiny.text_stream("Hello", temperature=0, max_gen_len=9)
    first = next(stream)

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(tiny.model, "hidden", failing)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert first.finish_reason is None and not tiny.engine.busy


def test_close_from_another_thread(tiny: Llama) -> None:
    """As a server does when its client disconnects."""
    stream = tiny.text_stream("Hello", temperature=0)
    next(stream)
    thread = threading.Thread(target=stream.close)
    for i, _ in enumerate(stream):
        if i == 3:
            thread.start()
            thread.join(60)
    assert stream.generation.finish_reason == "cancelled"
    assert i <= 4 and not tiny.engine.busy
    assert list(stream) == []


def test_nothing_to_generate(tiny: Llama) -> None:
    [piece] = tiny.text_stream("Hello", max_gen_len=0)
    assert (piece.text, piece.tokens, piece.finish_reason) == ("", [], "length")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"stop": "text"}, TypeError),
        ({"stop": [1]}, TypeError),
        ({"stop": None}, TypeError),
        ({"stop": iter(["x"])}, TypeError),
        ({"stop": [""]}, ValueError),
        ({"temperature": -1}, ValueError),
        ({"max_gen_len": -1}, ValueError),
        ({"unknown": 1}, TypeError),
    ],
)
def test_bad_options_are_refused_at_the_call(
    tiny: Llama, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        tiny.text_stream("Hello", **options)
