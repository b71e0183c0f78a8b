"""Llama.build with speculation: what it decides, what it refuses, and the same answers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.commands.parser import parse
from llama.generation import BuildOptions, speculation_of
from llama.layers import kernels
from llama.layers.schemes import SCHEMES
from tests.engine.guessing import propose_answers

Tiny = Callable[..., Path]
VOCABULARY = 512  # of `byte_tokenizer_path`


@pytest.fixture
def build(folder: Path, byte_tokenizer_path: Path) -> Callable[..., Llama]:
    def built(**options: Any) -> Llama:
        options = {"device": "cpu", "dtype": "fp32"} | options
        return Llama.build(folder, byte_tokenizer_path, 128, 2, **options)

    return built


def on(llama: Llama) -> bool:
    """Whether prompt lookup is on."""
    return llama.engine.speculator.lookup


def test_by_default_where_it_cannot_be_slower(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert on(build()) == kernels.load()
    assert on(build(speculate=True)) and not on(build(speculate=False))
    assert not on(build(exact=True))
    monkeypatch.setattr(kernels, "load", lambda: False)
    assert not on(build())


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_ids_and_scores_are_those_without(build: Callable[..., Llama], temperature: float) -> None:
    """Item 19 of docs/parity.md. Two rows, with seeds; one row from the global generator."""
    prompts = [[1, 2, 3, 4] * 5, [9, 8, 7] * 4]
    fast, plain = build(speculate=True), build(speculate=False)
    for options in {"seed": [3, 4]}, {"seed": 5, "n": 2}:
        a, b = (
            llama.generate(prompts, 30, temperature=temperature, logprobs=True, **options)
            for llama in (fast, plain)
        )
        assert a[0] == b[0] and a[1] and b[1]
        for x, y in zip(a[1], b[1], strict=True):
            assert x == pytest.approx(y, abs=1e-4)
    found = []
    for llama in fast, plain:
        torch.manual_seed(1)
        found.append(llama.generate(prompts[:1], 30, temperature=temperature))
    assert found[0] == found[1] and fast.engine.metrics().proposed_tokens


def test_a_stream_is_the_completion(
    build: Callable[..., Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece may have several tokens; a stop string may be anywhere in them."""
    fast, plain = build(speculate=True), build(speculate=False)
    options: dict[str, Any] = {"temperature": 0, "max_gen_len": 40, "logprobs": True}
    prompt = "abcabc"
    ids = plain.tokenizer.encode(prompt, bos=True, eos=False)
    [answer], _ = plain.generate([ids], 40, temperature=0)
    propose_answers(monkeypatch, [(ids, answer)], wrong=5)
    [whole] = plain.text_completion([prompt], **options)
    pieces = list(fast.text_stream(prompt, **options))
    assert "".join(p.text for p in pieces) == whole["generation"]
    assert sum(len(p.tokens) for p in pieces) == len(whole["tokens"]) == 40
    assert len(pieces) < 40 and all(len(p.tokens) == len(p.logprobs) for p in pieces)
    stop = whole["generation"][5:8]
    [ended] = plain.text_completion([prompt], stop=[stop], **options)
    with fast.text_stream(prompt, stop=[stop], **options) as stream:
        assert "".join(p.text for p in stream) == ended["generation"]


def test_a_draft_proposes_and_is_closed_with_the_llama(
    build: Callable[..., Llama], tiny_checkpoint: Tiny, byte_tokenizer_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    draft = tiny_checkpoint(dim=32, n_layers=1, vocab_size=VOCABULARY)
    (draft / "tokenizer.model").write_bytes(byte_tokenizer_path.read_bytes())
    with caplog.at_level(logging.INFO, "llama"):
        llama = build(draft=draft)
    assert f"Draft {draft}: 0.00 GB of weights, 0.00 GB of KV cache" in caplog.text
    want = build(speculate=False).generate([[1, 2, 3], [5]], 30, temperature=0)
    assert llama.generate([[1, 2, 3], [5]], 30, temperature=0) == want
    assert llama.engine.metrics().proposed_tokens
    drawn, _ = llama.generate([[1, 2, 3]], 30, temperature=1.0, seed=3)
    assert llama.generate([[1, 2, 3]], 30, temperature=1.0, seed=3)[0] == drawn
    speculator = llama.engine.speculator
    llama.close()
    assert speculator.draft is None


def test_what_is_refused(
    build: Callable[..., Llama], tiny_checkpoint: Tiny, byte_tokenizer_path: Path
) -> None:
    other = tiny_checkpoint(dim=32, n_layers=1, vocab_size=511)
    lines = byte_tokenizer_path.read_text().splitlines()
    swapped = [lines[1].split()[0] + " 0", lines[0].split()[0] + " 1", *lines[2:-1]]
    (other / "tokenizer.model").write_text("\n".join(swapped))
    with pytest.raises(ValueError, match=r"has another vocabulary .* same model family"):
        build(draft=other)
    with pytest.raises(FileNotFoundError, match="absent; check draft"):
        build(draft=other / "absent")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer; put there its tokenizer\.model"):
        build(draft=tiny_checkpoint(dim=32, n_layers=1, vocab_size=VOCABULARY))
    with pytest.raises(ValueError, match="exact and speculate"):
        build(exact=True, speculate=True)
    with pytest.raises(ValueError, match="exact and speculate"):
        build(exact=True, draft=other)
    with pytest.raises(ValueError, match="speculate=False forbids it"):
        build(speculate=False, draft=other)
    with pytest.raises(TypeError, match="speculate must be True, False or None, not 'yes'"):
        build(speculate="yes")


def test_flags(monkeypatch: pytest.MonkeyPatch, demo: Llama) -> None:
    seen = []

    def open_model(checkpoint: object, build: Any) -> Llama:
        seen.append((build.speculate, build.draft))
        return demo

    monkeypatch.setattr("llama.commands.generate.open_model", open_model)
    for flags in [], ["--speculate"], ["--no-speculate"], ["--draft", "small"]:
        parse(["complete", "Hi", "-n", "1", *flags])()
    assert seen == [(None, None), (True, None), (False, None), (None, "small")]


def test_costs_follow_from_the_weights(build: Callable[..., Llama]) -> None:
    llama = build(speculate=True)
    options = {name: BuildOptions(speculate=True, quantize=name) for name in (None, "int8", "int4")}
    found = {n: speculation_of(llama.model, None, o) for n, o in options.items()}
    assert len({s.costs for s in found.values() if s}) == 3
    stored = speculation_of(llama.model, SCHEMES["int8"], options[None])
    assert stored == found["int8"]
