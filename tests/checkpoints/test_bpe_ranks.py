"""formats/bpe_ranks.py: rank files and sidecars, compared with the `tokenizers` library."""

from __future__ import annotations

import base64
import itertools
import random
from typing import Any

import pytest
import tokenizers
from tokenizers import models

from llama.checkpoints.formats.bpe_ranks import _apply_merges, rank_file, sidecar
from tests.checkpoints.gguf_files import SPECIAL, tiktoken_bpe, trained
from tests.fuzz.bounds import bounds


def random_bpe(rng: random.Random) -> tuple[dict[str, int], list[str]]:
    """A vocabulary over a, b, c with merges; some have no rank file."""
    tokens, merges = ["a", "b", "c"], list[str]()
    for _ in range(rng.randrange(1, 9)):
        left, right = rng.choice(tokens), rng.choice(tokens)
        if left + right not in tokens:
            tokens.append(left + right)
            merges.append(f"{left} {right}")
        elif f"{left} {right}" not in merges and rng.random() < 0.7:
            merges.append(f"{left} {right}")  # a second merge to the same token, later
    if rng.random() < 0.5:  # in the order of the ids
        merges.sort(key=lambda merge: tokens.index(merge.replace(" ", "")))
    if rng.random() < 0.2:
        merges.pop(rng.randrange(len(merges)))
    elif rng.random() < 0.2:
        rng.shuffle(merges)
    return {text: i for i, text in enumerate(tokens)}, merges


@pytest.mark.parametrize("whole_pieces", [False, True])
def test_rank_file_is_exact_or_an_error(whole_pieces: bool) -> None:
    rng = random.Random(1)
    texts = ["".join(rng.choices("abc", k=rng.randrange(1, 12))) for _ in range(150)]
    written = failed = 0
    for _ in range(400):
        vocab, merges = random_bpe(rng)
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        reference = tokenizers.Tokenizer(models.BPE(vocab, pairs, ignore_merges=whole_pieces))
        try:
            ranks = rank_file(vocab, merges, whole_pieces)
        except ValueError:
            failed += 1
            continue
        written += 1
        encode = tiktoken_bpe(ranks, {"pat_str": r"[\s\S]+", "special_tokens": {"<s>": 99}})
        for text in [*texts, *vocab]:
            assert encode(text) == reference.encode(text).ids, (text, vocab, merges)
    assert written > 100
    assert failed > 50


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ({"a": 0, "b": 1, "ab": 2, "ba": 3}, ["b a", "a b"], "'a b' is not in the order"),
        ({"a": 0, "b": 1}, ["a b"], "'a b' is not in the order"),
        ({"a": 0, "ab": 1}, ["a b"], "'a b' is not in the order"),
        ({"a": 0, "b": 1, "ab": 2}, [], "no merges produce the token b'ab'"),
        ({"a": 0, "b c": 1}, [], "GPT-2"),
    ],
)
def test_impossible_rank_files(vocab: dict[str, int], merges: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_file(vocab, merges, whole_pieces=True)


def test_bytes_of_gpt2_characters() -> None:
    tokens, merges = trained()
    vocab = {text: i for i, text in enumerate(tokens)}
    lines = [line.split() for line in rank_file(vocab, merges, whole_pieces=False).splitlines()]
    assert [int(rank) for _, rank in lines] == list(range(497))
    raw = [base64.b64decode(token) for token, _ in lines]
    decoder = tokenizers.decoders.ByteLevel()
    assert [t.decode(errors="replace") for t in raw] == [decoder.decode([t]) for t in tokens]
    assert set(raw) >= {bytes([b]) for b in range(256)}


LLAMA3 = {
    "<|begin_of_text|>": 7,
    "<|eot_id|>": 8,
    "<|end_of_text|>": 9,
    "<|start_header_id|>": 10,
    "<|eom_id|>": 11,
}


@pytest.mark.parametrize(
    ("special", "bos", "eos", "pad", "expected"),
    [
        (
            SPECIAL,
            None,
            499,
            497,
            {
                "bos_token": None,
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "stop_tokens": ["<|im_end|>", "<|endoftext|>"],
                "chat_format": "chatml",
            },
        ),
        (
            LLAMA3,
            7,
            8,
            None,
            {
                "bos_token": "<|begin_of_text|>",
                "eos_token": "<|eot_id|>",
                "pad_token": None,
                "stop_tokens": ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"],
                "chat_format": "llama3",
            },
        ),
        (
            {"<s>": 0, "</s>": 1},
            0,
            1,
            0,
            {
                "bos_token": "<s>",
                "eos_token": "</s>",
                "pad_token": "<s>",
                "stop_tokens": ["</s>"],
                "chat_format": None,
            },
        ),
    ],
    ids=["chatml", "llama3", "neither"],
)
def test_sidecar(
    special: dict[str, int],
    bos: int | None,
    eos: int,
    pad: int | None,
    expected: dict[str, Any],
) -> None:
    common = {"pat_str": "[ab]", "special_tokens": special, "default_system": None}
    assert sidecar("[ab]", special, bos, eos, pad) == common | expected


@pytest.mark.parametrize("ids", [(5, 499, None), (None, 5, None), (None, 499, 5)])
def test_sidecar_names_only_tokens(ids: tuple[Any, Any, Any]) -> None:
    with pytest.raises(ValueError, match="token 5 is not in the vocabulary"):
        sidecar("", SPECIAL, *ids)


def test_merges_of_random_orders() -> None:
    """Oracle: the definition, which looks at every pair for every merge."""
    rng = random.Random(0)
    parts = [b"a", b"b", b"ab", b"ba", b"aa", b"aab", b"abab", b"bb"]
    for _ in range(500):
        pairs = rng.sample([(x, y) for x in parts for y in parts], rng.randrange(1, 40))
        order = {pair: i for i, pair in enumerate(pairs)}
        token = bytes(rng.choice(b"ab") for _ in range(rng.randrange(30)))
        expected = [token[i : i + 1] for i in range(len(token))]
        while found := [
            (order[pair], i) for i, pair in enumerate(itertools.pairwise(expected)) if pair in order
        ]:
            i = min(found)[1]
            expected[i : i + 2] = [expected[i] + expected[i + 1]]
        assert _apply_merges(token, order) == expected


def test_long_tokens_and_templates_take_little_time() -> None:
    """Each took a minute."""
    with bounds():
        parts = _apply_merges(b"a" * 20_000, {(b"a", b"a"): 0, (b"aa", b"aa"): 1})
        assert parts == [b"aaaa"] * 5_000


def test_merges_that_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="merge 'ab' is not two tokens"):
        rank_file({"a": 0, "b": 1, "ab": 2}, ["ab"], whole_pieces=True)
