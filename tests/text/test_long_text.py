"""Whitespace of any shape against tiktoken's and Meta's ids, and split patterns of a sidecar."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from llama.text import long_text
from llama.text.long_text import UncutEncoder, has_long_whitespace
from llama.tokenizer import Tokenizer
from tests.test_tokenizer import SIDECAR, write_small

WHITESPACE = [" ", "\t", "\n", "\r\n", "\u3000", "\u2028", " \t", "  \n"]


@pytest.fixture(scope="module")
def ours(llama3_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(str(llama3_tokenizer_path), "llama3.1")


@pytest.mark.parametrize("text", WHITESPACE)
def test_many_runs_of_whitespace(ours: Tokenizer, text: str) -> None:
    """Each run is shorter than is searched for. A search at every position took 15 s a line."""
    line = text * (99_000 // len(text)) + "x"
    ids = ours.encode(line * 3, bos=False, eos=False)
    assert ids == ours.model.encode_ordinary(line * 3)


def test_lines_of_spaces_have_metas_ids(ours: Tokenizer, llama3_tokenizer_path: Path) -> None:
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    meta = MetaTokenizer(llama3_tokenizer_path)
    for width in (24_000, 25_000):  # Meta's code cuts longer runs
        lines = (" " * width + "x\n") * (390_000 // width)  # and longer texts
        assert ours.encode(lines, bos=True, eos=False) == meta.encode(lines, bos=True, eos=False)


def test_a_long_run_is_found_wherever_it_begins() -> None:
    for length, found in ((49_999, False), (100_000, True)):
        for before in (0, 1, 49_999, 50_000, 50_001, 123_456):
            for after in ("", "x"):
                assert has_long_whitespace("x" * before + " " * length + after) == found


def test_both_ways_of_splitting_give_the_same_ids(
    ours: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way for long whitespace, taken for short texts too."""
    rng, encoder = random.Random(0), UncutEncoder(ours.model, ours.pat_str, ours.ranks)
    texts = ["".join(rng.choices([*WHITESPACE, "a", "1", "-", "'s"], k=99)) for _ in range(20)]
    monkeypatch.setattr(long_text, "has_long_whitespace", lambda s: True)
    for text in texts:
        assert encoder.encode(text, set(), ()) == ours.model.encode_ordinary(text)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"\d*", "matches the empty text"),
        (r"[^x]|", "matches the empty text"),
        (r"(?=\()|[\s\S]", "matches the empty text"),
        (r"\b|[\s\S]", "matches the empty text"),
        ("", "matches the empty text"),
        ("[", "cannot be used"),
        (r"\p{Nothing}", "cannot be used"),
    ],
)
def test_split_patterns_that_cannot_be_used(tmp_path: Path, pattern: str, message: str) -> None:
    path = write_small(tmp_path, SIDECAR | {"pat_str": pattern})
    with pytest.raises(ValueError, match=message):
        Tokenizer(path)


def test_an_empty_match_that_only_a_text_shows(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """tiktoken panics with a BaseException of its own, which would pass `except Exception`."""
    t = Tokenizer(write_small(tmp_path, SIDECAR | {"pat_str": r"(?=Ω)|[\s\S]"}))
    with pytest.raises(ValueError, match="cannot split this text"):
        t.encode("Ω", bos=False, eos=False)
    assert t.encode("abc", bos=False, eos=False) == list(b"abc")
    capfd.readouterr()  # Rust's report of the panic


@pytest.mark.parametrize("pattern", [r"(a|b)+|[\s\S]", r"(?P<two>[\s\S]{2})|([\s\S])"])
def test_a_pattern_with_groups_splits_as_without(tmp_path: Path, pattern: str) -> None:
    plain = pattern.replace("?P<two>", "").replace("(", "(?:")
    kinds: list[Any] = []
    for i, pat_str in enumerate((pattern, plain)):
        (tmp_path / str(i)).mkdir()
        path = write_small(tmp_path / str(i), SIDECAR | {"pat_str": pat_str}, drop=b"q\xc3")
        t = Tokenizer(path)
        kinds.append(t.encode("abba xab", bos=False, eos=False))
        for text in ("a quick", "né"):
            with pytest.raises(ValueError, match=r"lacks '[qé]'"):
                t.encode(text, bos=False, eos=False)
    assert kinds[0] == kinds[1]
