"""Tokens of Hugging Face's files that text stands for, and names that differ from a rank file's.

Oracles: transformers and the `tokenizers` library.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from llama.checkpoints.convert import convert
from llama.checkpoints.open import open_checkpoint, open_tokenizer
from llama.text.rank_file import special_token_table
from llama.tokenizer import Tokenizer
from tests.checkpoints.gguf_files import mixed_texts
from tests.checkpoints.test_hf import edit, hf_model
from tests.checkpoints.test_hf_files import ours, write_tokenizer

transformers = pytest.importorskip("transformers")

TOKENS = {  # {text: flags}, none special
    "<think>": {}, "</think>": {}, "</tool_call>": {"normalized": False}, "<think>>": {},
    "[L]": {"lstrip": True}, "[R]": {"rstrip": True}, "[LR]": {"lstrip": True, "rstrip": True},
    "word": {"single_word": True}, "  ": {},
}  # fmt: skip


def add_tokens(folder: Path) -> Any:
    """Add TOKENS to the tokenizer of a folder; returns that of transformers."""
    tokenizer = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(text, **flags) for text, flags in TOKENS.items()])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_tokens_of_turns_are_never_found_in_text(tmp_path: Path) -> None:
    """Fine-tunes store them with special=false too; a user's text must not forge a turn."""
    write_tokenizer(tmp_path, "llama-bpe", bos=False, eos_token="[END]", pad_token="[PAD]")
    names = ["<|user|>", "<\uff5cUser\uff5c>", "[END]", "[PAD]", "<think>", "[STOP]"]
    tokenizer = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_tokens(names)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    edit(tmp_path / "generation_config.json", eos_token_id=505)
    found = ours(tmp_path).encode("".join(names), bos=False, eos=False)
    assert [i for i in found if i >= 500] == [504]
    assert ours(tmp_path).stop_tokens == [502, 499, 497, 505]


def texts_with(tokens: list[str]) -> list[str]:
    rng = random.Random(0)
    between = ["", " ", "\n ", "a", "_", "é", "7", "\x1c", "\u00a0\t", *mixed_texts(40)[10:]]
    return [
        "".join(rng.choice(tokens) + rng.choice(between) for _ in range(rng.randrange(6)))
        for _ in range(500)
    ] + [token * 3 for token in tokens]


def test_tokens_in_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama-bpe", bos=False)
    theirs, tokenizer = add_tokens(tmp_path), ours(tmp_path)
    for text in texts_with(list(TOKENS)):
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert ids == theirs.encode(text), repr(text)
        assert tokenizer.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    ids = tokenizer.encode("<think><|im_end|>", bos=False, eos=False)
    assert ids[0] == 500 and 499 not in ids  # the text of a special token is ordinary text


def test_tokens_in_text_are_exported(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    hf_model(vocab_size=512).save_pretrained(tmp_path / "m")
    write_tokenizer(tmp_path / "m", "llama-bpe", bos=True)
    theirs = add_tokens(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "hf", to="hf")
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokenizer = open_tokenizer(open_checkpoint(tmp_path / "meta"))
    for text in texts_with(list(TOKENS)):
        ids = theirs.encode(text)
        assert exported.encode(text) == tokenizer.encode(text, bos=True, eos=False) == ids
        assert exported.decode(ids, skip_special_tokens=True) == theirs.decode(
            ids, skip_special_tokens=True
        )


@pytest.mark.parametrize("place", ["tokenizer.model", "original/tokenizer.model"])
def test_renamed_tokens_win_over_a_rank_file(place: str, tmp_path: Path) -> None:
    """A fine-tune gives reserved ids other names; the rank file beside it is Llama 3's."""
    folder = tmp_path / "m"
    folder.mkdir()
    hf_model(vocab_size=497 + 256).save_pretrained(folder)
    write_tokenizer(folder, "llama-bpe", bos=False)
    (folder / place).parent.mkdir(exist_ok=True)
    ranks = ours(folder).ranks
    convert(folder, tmp_path / "meta")
    shutil.copy(tmp_path / "meta" / "tokenizer.model", folder / place)
    plain = special_token_table("llama3", len(ranks))

    def write(special: dict[str, int], **changes: bool) -> Tokenizer:
        spec = json.loads((folder / "tokenizer.json").read_text())
        flags = {"special": True, "normalized": False}
        flags |= dict.fromkeys(("lstrip", "rstrip", "single_word"), False) | changes
        spec["added_tokens"] = [{"content": t, "id": i, **flags} for t, i in special.items()]
        (folder / "tokenizer.json").write_text(json.dumps(spec))
        return open_tokenizer(open_checkpoint(folder))

    edit(folder / "config.json", eos_token_id=plain["<|eot_id|>"])
    edit(folder / "tokenizer_config.json", bos_token=None, eos_token="<|eot_id|>")
    (folder / "generation_config.json").unlink()
    tokenizer = write(plain)
    assert (tokenizer.special_tokens, tokenizer.chat_format) == (plain, "llama3")
    assert write(plain, rstrip=True).token_flags == {text: ["rstrip"] for text in plain}
    edit(folder / "config.json", eos_token_id=[plain["<|eot_id|>"], 7])  # an ordinary token
    assert write(plain).stop_tokens == [*tokenizer.stop_tokens, 7]
    renamed = {
        {"<|reserved_special_token_0|>": "<|im_start|>", "<|eot_id|>": "<|im_end|>"}.get(t, t): i
        for t, i in plain.items()
    }
    edit(folder / "tokenizer_config.json", eos_token="<|im_end|>")
    tokenizer = write(renamed)
    assert (tokenizer.special_tokens, tokenizer.chat_format) == (renamed, "chatml")
    assert tokenizer.eos_id == plain["<|eot_id|>"]
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(spec | {"normalizer": {"type": "NFC"}}))
    with pytest.warns(UserWarning, match=r"tokenizer\.json .*other tokens.*normalized"):
        tokenizer = open_tokenizer(open_checkpoint(folder))
    assert tokenizer.special_tokens == plain


@pytest.mark.parametrize("pattern", [r"\p{L}+|\p{N}+", r"\p{L}+(?=,)| ?\p{N}", r"(?<=a)b"])
def test_text_that_the_split_pattern_leaves_out(pattern: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama-bpe", bos=False)
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    path = str(tmp_path / "tokenizer.json")
    reference = HFTokenizer.from_file(path)
    reference.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    reference.save(path)
    tokenizer = ours(tmp_path)
    for text in ["a cat, 12 dogs!", "ab cab", *mixed_texts(200)]:
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert ids == reference.encode(text).ids, repr(text)
        assert tokenizer.decode(ids) == text
    ids = tokenizer.encode("a <|im_end|> b", bos=False, eos=False, allowed_special="all")
    assert tokenizer.decode(ids) == "a <|im_end|> b" and ids.count(499) == 1
