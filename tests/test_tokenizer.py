"""Tokenizer of tokenizer.py against Meta's tokenizer, with the official rank file."""

from __future__ import annotations

import base64
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from llama.text.rank_file import LLAMA3_PATTERN
from llama.tokenizer import Tokenizer

# What random texts consist of: scripts, emoji, code, digits, whitespace, texts of special tokens.
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    " \t\n\r\u00a0\u2003\u3000",
    "!?.,;:'\"()[]{}<>|/\\@#$%^&*-_=+~`",
    "éüñçøßÆœğşИжЯλΩאבשعربيहिन्दीไทย漢字かなカナ한글",
    "😀🎉👍🏽👩‍👩‍👧🇫🇷❤️",
    "\u200b\u200d\ufeff\u0301\u0000\u007f\U0010ffff\ufffd",
]
PIECES = [
    "'s", "'LL", "don't", "def f(x):\n    return x\n", "  \n\n  ", "\r\n\r\n", " \t ", "3.14159",
    "1,000,000", "http://a.b/c?d=e&f", "<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|reserved_special_token_17|>", "<|python_tag|>", "<|im_end|>", "Hello world",
    "    ", "\ud83d",
]  # fmt: skip


def random_text(rng: random.Random) -> str:
    parts = []
    for _ in range(rng.randint(0, 8)):
        if rng.random() < 0.3:
            parts.append(rng.choice(PIECES))
        else:
            alphabet = rng.choice(ALPHABETS)
            parts.append("".join(rng.choices(alphabet, k=rng.randint(1, 12))))
    return "".join(parts)


@pytest.fixture(scope="module")
def ours(llama3_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(str(llama3_tokenizer_path), "llama3.1")


@pytest.fixture(scope="module")
def meta(llama3_tokenizer_path: Path) -> Any:
    from llama_models.llama3.tokenizer import Tokenizer as MetaTokenizer

    return MetaTokenizer(llama3_tokenizer_path)


def test_ids_equal_metas_on_10_000_texts(ours: Tokenizer, meta: Any) -> None:
    rng = random.Random(0)
    for i in range(10_000):
        text = random_text(rng)
        options: dict[str, Any] = {"bos": bool(i % 2), "eos": bool(i % 3)}
        if i % 5 == 0:
            options["allowed_special"] = "all"
        elif i % 5 == 1:
            options["allowed_special"] = {"<|eot_id|>"}
        got = ours.encode(text, **options)
        assert got == meta.encode(text, **options), repr(text)
        assert ours.decode(got) == meta.decode(got)


@pytest.mark.parametrize("text", ["a", "😀", "hello world ", "é"])
def test_ids_equal_metas_on_a_million_characters(ours: Tokenizer, meta: Any, text: str) -> None:
    long = text * (1_000_000 // len(text))
    if text == "hello world ":  # Meta's code cuts at 400,000 characters, inside a word
        long = long[:400_000]
    assert ours.encode(long, bos=True, eos=False) == meta.encode(long, bos=True, eos=False)


@pytest.mark.parametrize("text", [" ", "\n", "7", "=", "hello world "])
def test_long_runs_are_not_cut(
    ours: Tokenizer, meta: Any, text: str, llama3_tokenizer_path: Path
) -> None:
    """Meta's cuts change tokens. Without cuts, the ids are those of tiktoken."""
    plain: tiktoken.Encoding = meta.model
    long = text * (500_000 // len(text)) + "x"
    assert ours.encode(long, bos=False, eos=False) == plain.encode_ordinary(long)
    assert meta.encode(long, bos=False, eos=False) != plain.encode_ordinary(long)


def test_whitespace_too_long_for_tiktoken(ours: Tokenizer, meta: Any) -> None:
    """A run that overflows tiktoken does not change the tokens of the text around it."""
    run = " " * 1_000_000
    with pytest.raises(ValueError, match="stack"):
        meta.model.encode(run)
    got = ours.encode(f"one,{run}two<|eot_id|>3", bos=False, eos=False, allowed_special="all")
    assert ours.decode(got) == f"one,{run}two<|eot_id|>3"
    tail = ours.encode(" two<|eot_id|>3", bos=False, eos=False, allowed_special="all")
    assert got[:2] == ours.encode("one,", bos=False, eos=False) and got[-len(tail) :] == tail
    # The run is one piece: tokens of 128 spaces and a remainder.
    widest = max(len(t) for t in meta.model.token_byte_values() if set(t) == {32})
    lengths = [len(ours.decode_bytes([t])) for t in got[2 : -len(tail)]]
    assert sum(lengths) == 999_999 and lengths.count(widest) >= 999_999 // widest - 1
    with pytest.raises(ValueError, match="disallowed"):
        ours.encode(run + "<|eot_id|>", bos=False, eos=False, disallowed_special="all")


def test_special_token_at_metas_cut(ours: Tokenizer, meta: Any) -> None:
    text = "a" * 399_995 + "<|eot_id|>" + "b"
    got = ours.encode(text, bos=False, eos=False, allowed_special="all")
    assert got.count(ours.eot_id) == 1
    assert meta.encode(text, bos=False, eos=False, allowed_special="all").count(ours.eot_id) == 0


def test_disallowed_special(ours: Tokenizer) -> None:
    with pytest.raises(ValueError, match="eot_id"):
        ours.encode("<|eot_id|>", bos=False, eos=False, disallowed_special="all")


def test_special_token_tables(ours: Tokenizer, meta: Any, llama3_tokenizer_path: Path) -> None:
    assert ours.special_tokens == meta.special_tokens
    for name in ("n_words", "bos_id", "eos_id", "eot_id", "eom_id", "pad_id", "stop_tokens"):
        assert getattr(ours, name) == getattr(meta, name), name
    three = Tokenizer(llama3_tokenizer_path)  # the table of Llama 3 is the default
    names = {i: name for name, i in three.special_tokens.items()}
    assert three.n_words == 128256 and len(names) == 256
    assert [names[128000 + i] for i in range(11)] == [
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>", "<|reserved_special_token_2|>",
        "<|reserved_special_token_3|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|reserved_special_token_4|>", "<|eot_id|>", "<|reserved_special_token_5|>",
    ]  # fmt: skip
    assert names[128255] == "<|reserved_special_token_250|>"
    assert set(three.stop_tokens) == {128001, 128009} and three.pad_id == -1


def test_replaced_file_is_read_again(tmp_path: Path, llama3_tokenizer_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    shutil.copy(llama3_tokenizer_path, path)
    assert Tokenizer(path).n_words == 128256
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1000]))
    assert Tokenizer(path).n_words == 1000 + 256


def test_remote_path_goes_through_blobfile(
    llama3_tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import blobfile

    opened: list[str] = []

    def remote(path: str, mode: str) -> Any:
        opened.append(path)
        return open(llama3_tokenizer_path, mode)

    monkeypatch.setattr(blobfile, "BlobFile", remote)
    assert Tokenizer("az://account/container/tokenizer.model").n_words == 128256
    assert opened == ["az://account/container/tokenizer.model"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>", "not a tiktoken rank file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "rank file"),
        (b"YQ== x\n", "line 1"),
        (b"YQ== 0\nYg== 0\n", "twice"),
        (b"", "empty"),
    ],
)
def test_files_that_are_no_rank_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer(path)


def test_missing_file_and_wrong_types(tmp_path: Path, ours: Tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model"):
        Tokenizer(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="str"):
        ours.encode(b"bytes", bos=True, eos=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="id 128256"):
        ours.decode([128256])
    with pytest.raises(ValueError, match="id -1"):
        ours.decode([-1])


def write_small(tmp_path: Path, sidecar: object, drop: bytes = b"") -> Path:
    path = tmp_path / "tokenizer.model"
    tokens = [bytes([b]) for b in range(256)] + [b"ab"]
    for b in drop:  # replaced by another token
        tokens[b] = b"%d dropped" % b
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    (tmp_path / "tokenizer.model.json").write_text(json.dumps(sidecar))
    return path


SIDECAR: dict[str, Any] = {
    "pat_str": r"[\s\S]{2}|[\s\S]",
    "special_tokens": {"<s>": 257, "</s>": 258, "<|im_start|>": 259, "<|im_end|>": 260},
    "bos_token": "<s>", "eos_token": "</s>", "pad_token": None, "stop_tokens": ["</s>"],
    "chat_format": "chatml", "default_system": "Be brief.",
}  # fmt: skip


def test_sidecar(tmp_path: Path) -> None:
    t = Tokenizer(write_small(tmp_path, SIDECAR))
    assert (t.bos_id, t.eos_id, t.pad_id, t.stop_tokens, t.n_words) == (257, 258, -1, [258], 261)
    assert t.encode("abab", bos=True, eos=True) == [257, 256, 256, 258]
    a, b = ord("a"), ord("b")  # the pieces are "xa" and "b", so "ab" is not merged
    assert t.encode("xab", bos=False, eos=False) == [ord("x"), a, b]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unknown": 1}, "keys among"),
        ({"eos_token": "</t>"}, "</t>"),
        ({"special_tokens": {"<s>": 3}}, r"both use the ids \[3\]"),
        ({"special_tokens": SIDECAR["special_tokens"] | {"<x>": 262}}, "no token with id 261"),
        ({"special_tokens": SIDECAR["special_tokens"] | {"": 261}}, "without text"),
        ({"chat_format": "alpaca"}, "chat_format"),
        ({"chat_bos": ["<s>"]}, "chat_bos must be a text"),
        ({"token_flags": ["<s>"]}, r"token_flags must be {text: \[flag"),
        ({"token_flags": {"<s>": ["bold"]}}, "token_flags may have the flags"),
    ],
)
def test_bad_sidecar(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer(write_small(tmp_path, SIDECAR | change))


def test_a_tokenizer_json_in_place_of_a_rank_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{\n  "version": "1.0"}')
    with pytest.raises(ValueError, match=r"json is JSON, not a .* give that folder without"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_sidecar_that_is_not_json(tmp_path: Path) -> None:
    path = write_small(tmp_path, SIDECAR)
    (tmp_path / "tokenizer.model.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        Tokenizer(path)


def test_unknown_character(tmp_path: Path) -> None:
    t = Tokenizer(write_small(tmp_path, SIDECAR, drop=b"q\xc3"))
    assert t.encode("abc", bos=False, eos=False)
    for text in ("a quick", "né"):
        with pytest.raises(ValueError, match=r"lacks '[qé]'"):
            t.encode(text, bos=False, eos=False)


def test_pattern_is_metas(meta: Any) -> None:
    assert meta.pat_str == LLAMA3_PATTERN


def test_bos_and_eos_have_the_defaults_of_a_completion(llama3_tokenizer_path: Path) -> None:
    tokenizer = Tokenizer(llama3_tokenizer_path)
    assert tokenizer.encode("hi") == tokenizer.encode("hi", bos=True, eos=False)
    assert tokenizer.encode("hi")[0] == tokenizer.bos_id
