"""The vocabulary of a GGUF as a rank file and its sidecar, also that of the demo model.

Oracle: the `tokenizers` library with the same vocabulary, merges and published pre-tokenizers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from llama.checkpoints import demo_model
from llama.checkpoints.convert import convert
from llama.checkpoints.formats.gguf_vocabulary import PRE_TOKENIZERS
from llama.tokenizer import Tokenizer
from tests.checkpoints.gguf_files import (
    mixed_texts,
    read_tokenizer,
    reference_bpe,
    tiktoken_bpe,
    trained,
    vocabulary_keys,
    write_gguf,
)


def read(path: Path) -> tuple[bytes, dict[str, Any]]:
    """`read_tokenizer` of a file that has a BPE."""
    found = read_tokenizer(path)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("like", "names"),
    [
        ("llama-bpe", ["llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx"]),
        ("smollm", ["smollm", "starcoder", "command-r"]),
        ("gpt-2", ["gpt-2", "olmo"]),
    ],
)
def test_names_of_a_pre_tokenizer(like: str, names: list[str], tmp_path: Path) -> None:
    tokens, merges = trained()
    vocab = {text: i for i, text in enumerate(tokens)}
    reference = reference_bpe(vocab, merges, like, ignore_merges=like == "llama-bpe")
    expected = {text: reference.encode(text).ids for text in mixed_texts(200)}
    for name in names:
        path = write_gguf(tmp_path / f"{name}.gguf", keys=vocabulary_keys(name))
        encode = tiktoken_bpe(*read(path))
        for text, ids in expected.items():
            assert encode(text) == ids, (name, text)


@pytest.mark.parametrize("pre", ["default", None])
def test_first_files_of_llama_3(pre: str | None, tmp_path: Path) -> None:
    """The first conversions of Llama 3 do not name its pre-tokenizer."""
    special = {"<|begin_of_text|>": 497, "<|im_start|>": 498, "<|im_end|>": 499}
    expected = read(write_gguf(tmp_path / "a.gguf", keys=vocabulary_keys("llama-bpe", special)))
    keys = vocabulary_keys("llama-bpe", special) | {"tokenizer.ggml.pre": pre}
    assert read(write_gguf(tmp_path / "b.gguf", keys=keys)) == expected


def test_whole_pieces_under_another_name(tmp_path: Path) -> None:
    """Llama 3's vocabulary has tokens that no merges produce, also in a file of "smaug-bpe"."""
    tokens, merges = trained()
    tokens = [*tokens[:-1], "Ġdogsled"]
    keys = vocabulary_keys("llama-bpe", tokens=tokens, merges=merges[:-1])
    expected = read(write_gguf(tmp_path / "a.gguf", keys=keys))
    keys |= {"tokenizer.ggml.pre": "smaug-bpe", "tokenizer.ggml.add_bos_token": True}
    with pytest.warns(UserWarning, match="dogsled.*whole piece"):
        assert read(write_gguf(tmp_path / "b.gguf", keys=keys)) == expected


def test_user_defined_tokens_are_found_in_text(tmp_path: Path) -> None:
    keys = vocabulary_keys("smollm", {"<think>": 497, "<|im_start|>": 498, "<|im_end|>": 499})
    keys["tokenizer.ggml.token_type"] = [1] * 497 + [4, 3, 4]
    tokenizer = Tokenizer.from_vocabulary(*read(write_gguf(tmp_path / "m.gguf", keys=keys)), "x")
    ids = tokenizer.encode("a<think>b<|im_end|>", bos=False, eos=False)
    assert ids.count(497) == 1 and 499 not in ids  # which ends a turn
    assert tokenizer.decode(ids) == "a<think>b<|im_end|>"


def test_all_ids_that_end_a_turn_stop(tmp_path: Path) -> None:
    special = {"<|endoftext|>": 497, "<a>": 498, "<b>": 499}
    keys = vocabulary_keys("smollm", special)
    for role, i in {"eos": 20, "eot": 498, "eom": 499}.items():  # 20: an ordinary token
        keys[f"tokenizer.ggml.{role}_token_id"] = i
    tokenizer = Tokenizer.from_vocabulary(*read(write_gguf(tmp_path / "m.gguf", keys=keys)), "x")
    assert (tokenizer.eos_id, tokenizer.stop_tokens) == (20, [20, 497, 498, 499])


def test_whole_pieces_without_merges(tmp_path: Path) -> None:
    tokens, merges = trained()
    tokens = [
        *tokens[:-1],
        "Ġdogsled",
    ]  # found only as a whole piece, not by merges
    merges = merges[:-1]
    keys = vocabulary_keys("llama-bpe", tokens=tokens, merges=merges)
    encode = tiktoken_bpe(*read(write_gguf(tmp_path / "m.gguf", keys=keys)))
    vocab = {text: i for i, text in enumerate(tokens)}
    reference = reference_bpe(vocab, merges, "llama-bpe", ignore_merges=True)
    for text in ("a dogsled", "a dogsleds", "dogsled", " dogsled dogsled"):
        assert encode(text) == reference.encode(text).ids
    keys = vocabulary_keys("smollm", tokens=tokens, merges=merges)
    with pytest.raises(ValueError, match="dogsled"):
        read_tokenizer(write_gguf(tmp_path / "n.gguf", keys=keys))


@pytest.fixture(scope="module")
def demo_bpe(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], list[str]]:
    """Vocabulary and merges of the demo model, read by the `gguf` package."""
    try:
        tmp = tmp_path_factory.mktemp("demo")
        reader = gguf.GGUFReader(demo_model._installed_gguf() or demo_model._fetch_gguf(tmp))
    except RuntimeError as e:
        pytest.skip(f"the demo model's GGUF file is out of reach: {e}")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    return {text: i for i, text in enumerate(tokens) if i > 16}, merges


def test_rank_file_of_the_demo_model(
    demo_dir: Path, demo_bpe: tuple[dict[str, int], list[str]]
) -> None:
    reference = reference_bpe(*demo_bpe, "smollm", ignore_merges=False)
    ranks = (demo_dir / "tokenizer.model").read_bytes()
    sidecar = json.loads((demo_dir / "tokenizer.model.json").read_text("utf-8"))
    encode = tiktoken_bpe(ranks, sidecar)
    for text in [*mixed_texts(500), "a\x04b", "\U00040000 \U000bffff", "tab\x16\x1d."]:
        assert encode(text) == reference.encode(text).ids, repr(text)


@pytest.mark.parametrize(
    ("pre", "changes", "bos"),
    [
        ("smollm", {}, None),
        ("smollm", {"add_bos_token": True}, "<|im_start|>"),
        ("llama-bpe", {}, "<|im_start|>"),
        ("llama-bpe", {"add_bos_token": False}, None),
        ("llama-bpe", {"add_bos_token": False, "bos_token_id": None}, None),
    ],
)
def test_sidecar(pre: str, changes: dict[str, Any], bos: str | None, tmp_path: Path) -> None:
    keys = vocabulary_keys(pre)
    keys |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    keys["tokenizer.ggml.padding_token_id"] = 497
    assert read(write_gguf(tmp_path / "m.gguf", keys=keys))[1] == {
        "pat_str": PRE_TOKENIZERS[pre].pattern,
        "special_tokens": {"<|endoftext|>": 497, "<|im_start|>": 498, "<|im_end|>": 499},
        "bos_token": bos,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "stop_tokens": ["<|im_end|>", "<|endoftext|>"],
        "chat_format": "chatml",
        "default_system": None,
    }


def test_unused_tokens_have_an_id_and_no_text(tmp_path: Path) -> None:
    keys = vocabulary_keys("smollm")
    keys["tokenizer.ggml.token_type"] = [1] * 497 + [5, 4, 3]
    ranks, sidecar = read(write_gguf(tmp_path / "m.gguf", keys=keys))
    assert sidecar["special_tokens"] == {"<|im_start|>": 498, "<|im_end|>": 499}
    assert sidecar["unused_ids"] == [497]
    assert b" 497\n" not in ranks
    assert Tokenizer.from_vocabulary(ranks, sidecar, "x").decode([497, 499]) == "<|im_end|>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "qwen2"}, "pre-tokenizer 'qwen2'.*give the model's own tokenizer.model"),
        ({"pre": None}, "no 'tokenizer.ggml.pre'"),
        ({"tokens": None}, "no 'tokenizer.ggml.tokens'"),
        ({"token_type": None}, "no 'tokenizer.ggml.token_type'"),
        ({"merges": None}, "no 'tokenizer.ggml.merges'"),
        ({"eos_token_id": None}, "no 'tokenizer.ggml.eos_token_id'"),
        ({"bos_token_id": None, "add_bos_token": True}, "no 'tokenizer.ggml.bos_token_id'"),
        ({"eos_token_id": 500}, "eos token 500"),
        ({"padding_token_id": 999}, "pad token 999"),
        ({"token_type": [1] * 497 + [3, 3, 6]}, "type 6"),
        ({"token_type": [1] * 499}, "499 types"),
        ({"tokens": ["a"] * 500}, "same text"),
    ],
)
def test_unsupported_vocabularies(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    keys = vocabulary_keys("smollm")
    keys |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    path = write_gguf(tmp_path / "m.gguf", keys=keys)
    with pytest.raises(ValueError, match=message) as e:
        read_tokenizer(path)
    assert str(path) in str(e.value)


@pytest.mark.parametrize("model", [None, "llama", "no_vocab"])
def test_other_kinds_of_vocabulary(model: str | None, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", keys={"tokenizer.ggml.model": model})
    assert read_tokenizer(path) is None
    with pytest.warns(UserWarning, match="no tokenizer"):
        folder = convert(path, tmp_path / "out")
    assert {f.name for f in folder.iterdir()} == {"consolidated.00.pth", "params.json"}


def test_ordinary_pad_token_is_ignored(tmp_path: Path) -> None:
    keys = vocabulary_keys("smollm") | {"tokenizer.ggml.padding_token_id": 5}
    assert read(write_gguf(tmp_path / "m.gguf", keys=keys))[1]["pad_token"] is None
