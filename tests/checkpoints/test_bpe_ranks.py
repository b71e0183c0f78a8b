"""What the converters share: feed-forward terms, rank files, sidecars, folders that appear whole.

Oracles: Meta's formula, and the `tokenizers` library for the vocabulary and merges.
"""

from __future__ import annotations

import base64
import math
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models

from llama import ModelArgs
from llama.checkpoints.formats.vocabulary import ffn_terms, new_folder, rank_file, sidecar
from tests.checkpoints.gguf_files import SPECIAL, tiktoken_bpe, trained


def metas_hidden(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """What Meta's FeedForward makes of the two terms."""
    hidden = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return multiple_of * math.ceil(hidden / multiple_of)


def test_ffn_terms_give_exactly_the_width() -> None:
    rng = random.Random(0)
    shapes = [(rng.randrange(2, 20000, 2), rng.randrange(1, 60000)) for _ in range(2000)]
    for dim, hidden in [(64, 173), (2, 1), (6, 2**31 - 1), (2**16, 1), (8192, 28673), *shapes]:
        multiple_of, multiplier = ffn_terms(dim, hidden)
        assert metas_hidden(dim, multiple_of, multiplier) == hidden, (dim, hidden)
        ModelArgs(dim=dim, n_heads=1, multiple_of=multiple_of, ffn_dim_multiplier=multiplier)


@pytest.mark.parametrize(
    ("dim", "hidden", "multiplier"),
    [
        (576, 1536, None),
        (2048, 8192, None),
        (3072, 8192, None),
        (4096, 11008, None),
        (4096, 14336, 1.3),
        (8192, 28672, 1.3),
        (16384, 53248, 1.2),
    ],
)
def test_ffn_terms_of_known_models_are_natural(
    dim: int, hidden: int, multiplier: float | None
) -> None:
    multiple_of, found = ffn_terms(dim, hidden)
    assert found == multiplier
    assert multiple_of in (256, 1024, 4096)
    assert metas_hidden(dim, multiple_of, found) == hidden


@pytest.mark.parametrize(("dim", "hidden"), [(64, 0), (0, 64), (63, 64)])
def test_ffn_terms_refuse_impossible_sizes(dim: int, hidden: int) -> None:
    with pytest.raises(ValueError, match=r"positive|even"):
        ffn_terms(dim, hidden)


def random_bpe(rng: random.Random) -> tuple[dict[str, int], list[str]]:
    """A vocabulary over a, b, c with merges; mostly sound, now and then not."""
    tokens, merges = ["a", "b", "c"], list[str]()
    for _ in range(rng.randrange(1, 9)):
        left, right = rng.choice(tokens), rng.choice(tokens)
        if left + right not in tokens:
            tokens.append(left + right)
            merges.append(f"{left} {right}")
        elif f"{left} {right}" not in merges and rng.random() < 0.7:
            merges.append(f"{left} {right}")  # a second way to the same token, late
    if rng.random() < 0.5:  # in the order of the ids
        merges.sort(key=lambda merge: tokens.index(merge.replace(" ", "")))
    if rng.random() < 0.2:
        merges.pop(rng.randrange(len(merges)))
    elif rng.random() < 0.2:
        rng.shuffle(merges)
    return {text: i for i, text in enumerate(tokens)}, merges


@pytest.mark.parametrize("whole_pieces", [False, True])
def test_a_rank_file_is_either_exact_or_refused(whole_pieces: bool) -> None:
    rng = random.Random(1)
    texts = ["".join(rng.choices("abc", k=rng.randrange(1, 12))) for _ in range(150)]
    accepted = refused = 0
    for _ in range(400):
        vocab, merges = random_bpe(rng)
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        reference = tokenizers.Tokenizer(models.BPE(vocab, pairs, ignore_merges=whole_pieces))
        try:
            ranks = rank_file(vocab, merges, whole_pieces)
        except ValueError:
            refused += 1
            continue
        accepted += 1
        encode = tiktoken_bpe(ranks, {"pat_str": r"[\s\S]+", "special_tokens": {"<s>": 99}})
        for text in [*texts, *vocab]:
            assert encode(text) == reference.encode(text).ids, (text, vocab, merges)
    assert accepted > 100
    assert refused > 50


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        ({"a": 0, "b": 1, "ab": 2, "ba": 3}, ["b a", "a b"], "'a b' is out of the order"),
        ({"a": 0, "b": 1}, ["a b"], "'a b' is out of the order"),
        ({"a": 0, "ab": 1}, ["a b"], "'a b' is out of the order"),
        ({"a": 0, "b": 1, "ab": 2}, [], "do not make the token b'ab'"),
        ({"a": 0, "b c": 1}, [], "GPT-2"),
    ],
)
def test_what_ranks_cannot_say(vocab: dict[str, int], merges: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_file(vocab, merges, whole_pieces=True)


def test_bytes_are_gpt2s() -> None:
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
    assert sidecar("[ab]", special, bos, eos, pad, "") == common | expected


@pytest.mark.parametrize("ids", [(5, 499, None), (None, 5, None), (None, 499, 5)])
def test_sidecar_names_only_special_tokens(ids: tuple[Any, Any, Any]) -> None:
    with pytest.raises(ValueError, match="token 5 is not a special token"):
        sidecar("", SPECIAL, *ids, "")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}", "Be brief."),
        ("{{ '<|im_start|>system\\nBe brief.\\nPlease.<|im_end|>' }}", "Be brief.\nPlease."),
        ("{{ '<|im_start|>system\nYou\\'re kind<|im_end|>' }}", "You're kind"),
        ("<|im_start|>system\nOutside quotes<|im_end|>{{ 1 }}", "Outside quotes"),
        ("{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}", None),
        ("<|im_start|>system\n{{ system }}<|im_end|>", None),
        ("{{ '<|im_start|>user\nHello<|im_end|>' }}", None),
        ("", None),
    ],
)
def test_default_system(template: str, expected: str | None) -> None:
    assert sidecar("", SPECIAL, None, 499, None, template)["default_system"] == expected
    assert sidecar("", LLAMA3, None, 8, None, template)["default_system"] is None


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    dst = tmp_path / "new" / "model"
    with new_folder(dst) as folder:
        assert not dst.exists()
        (folder / "file").write_text("")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        "new",
        "new/model",
        "new/model/file",
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
def test_a_new_folder_leaves_nothing_after_an_error(error: Any, tmp_path: Path) -> None:
    with pytest.raises((KeyboardInterrupt, OSError)), new_folder(tmp_path / "model") as folder:
        (folder / "file").write_text("")
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (lambda tmp: OSError(27, "File too large"), "{dst} cannot be written (File too large); "),
        (lambda tmp: OSError(28, "No space", f"{tmp}/a"), "{dst} cannot be written (No space); "),
        (lambda tmp: OSError(f"{tmp}/a is too much"), "{dst}/a is too much"),
        (lambda tmp: OSError(5, "Input/output error", "/src"), "[Errno 5] Input/output error: "),
    ],
)
def test_a_new_folder_that_cannot_be_written(error: Any, said: str, tmp_path: Path) -> None:
    """What failed is named as the user did."""
    dst = tmp_path / "model"
    with pytest.raises(OSError) as caught, new_folder(dst) as folder:
        raise error(folder)
    assert str(caught.value).startswith(said.format(dst=dst)) and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    dst = tmp_path / "file" / "model"
    with pytest.raises(OSError, match=f"^{dst} cannot be written .Not a dir"), new_folder(dst):
        pass


def test_a_new_folder_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "keep").write_text("mine")
    with pytest.raises(FileExistsError, match="remove it or choose another"), new_folder(tmp_path):
        raise AssertionError("not reached")
    assert [p.name for p in tmp_path.iterdir()] == ["keep"]


def test_a_new_folder_yields_to_a_faster_process(tmp_path: Path) -> None:
    dst = tmp_path / "model"
    with pytest.raises(FileExistsError), new_folder(dst) as folder:
        (folder / "file").write_text("")
        dst.mkdir()
        (dst / "theirs").write_text("")
    assert [p.name for p in sorted(tmp_path.rglob("*"))] == ["model", "theirs"]
