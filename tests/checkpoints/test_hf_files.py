"""Damaged or incomplete Hugging Face folders, and formats/hf_tokenizer_import.py.

Oracles: the `tokenizers` library and transformers' converter of tiktoken files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, pre_tokenizers, processors

from llama.checkpoints.formats.hf import HFSource
from llama.checkpoints.formats.hf_tokenizer_import import read_vocabulary
from llama.text.rank_file import LLAMA3_PATTERN, special_token_table
from llama.tokenizer import Tokenizer
from tests.checkpoints.gguf_files import PRE_TOKENIZERS, mixed_texts, reference_bpe, trained
from tests.checkpoints.test_hf import edit, hf_model

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    hf_model().save_pretrained(folder, max_shard_size="100KB")
    return folder


@pytest.fixture
def copied(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "copy"))


def test_shards_without_an_index(copied: Path) -> None:
    before = HFSource(copied).shapes()
    (copied / "model.safetensors.index.json").unlink()
    assert HFSource(copied).shapes() == before
    first, second, *_ = sorted(copied.glob("*.safetensors"))
    (copied / "consolidated.safetensors").write_bytes(b"another model's")
    HFSource(copied).args()
    second.rename(copied / "elsewhere")
    with pytest.raises(ValueError, match=second.name):
        HFSource(copied)
    (copied / "elsewhere").rename(second)
    save_file(load_file(second) | load_file(first), second)
    with pytest.raises(ValueError, match="of another file; remove"):
        HFSource(copied)


def test_index_without_files(copied: Path) -> None:
    last = sorted(copied.glob("*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(ValueError, match=f"lacks 1 files: {last.name}; download"):
        HFSource(copied)
    edit(copied / "model.safetensors.index.json", weight_map={"lm_head.weight": "../x"})
    with pytest.raises(ValueError, match="outside its folder"):
        HFSource(copied)
    edit(copied / "model.safetensors.index.json", weight_map=None)
    with pytest.raises(ValueError, match="no weight_map"):
        HFSource(copied)


def test_missing_files(copied: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no Hugging Face folder"):
        HFSource(copied / "nowhere")
    for path in copied.glob("model*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors; download it$"):
        HFSource(copied)
    (copied / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"\.bin files: save it as safetensors"):
        HFSource(copied)
    (copied / "config.json").write_text("<html>")
    with pytest.raises(ValueError, match=r"config\.json is not JSON.*download it again"):
        HFSource(copied)
    (copied / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="not a JSON object"):
        HFSource(copied)
    (copied / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        HFSource(copied)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"version https://git-lfs.example/spec/v1\noid sha256:00\nsize 3\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>not found</html>", "web page; download"),
        (b"", "truncated or damaged"),
        (b"\x00" * 100, "truncated or damaged"),
        (None, "truncated or damaged"),
    ],
)
def test_damaged_files(content: bytes | None, match: str, copied: Path) -> None:
    path = sorted(copied.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=match) as caught:
        HFSource(copied)
    assert path.name in str(caught.value)


def write_tokenizer(folder: Path, pre: str, bos: bool, **config: Any) -> Any:
    """Write a trained BPE with three special tokens; returns the tokenizer of transformers."""
    tokens, merges = trained()
    vocab = {text: i for i, text in enumerate(tokens)}
    bpe = reference_bpe(vocab, merges, pre, ignore_merges=pre == "llama-bpe")
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    if bos:
        template = processors.TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", 498)]
        )
        bpe.post_processor = processors.Sequence([processors.ByteLevel(), template])
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"} | config
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", **settings)
    return transformers.AutoTokenizer.from_pretrained(folder)


def ours(folder: Path) -> Tokenizer:
    found = read_vocabulary(folder)
    assert found is not None
    return Tokenizer.from_vocabulary(*found, "test")


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("add_bos", [True, False, None])
def test_vocabulary(pre: str, bos: bool, add_bos: bool | None, tmp_path: Path) -> None:
    pad = {"__type": "AddedToken", "content": "<|endoftext|>", "special": True}
    config = {} if add_bos is None else {"add_bos_token": add_bos}
    reference = write_tokenizer(tmp_path, pre, bos, pad_token=pad, **config)
    tokenizer = ours(tmp_path)
    for text in mixed_texts(60):
        assert tokenizer.encode(text, bos=True, eos=False) == reference.encode(text), repr(text)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.chat_format) == (499, 497, "chatml")


def test_gpt2_pattern_and_list_merges(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "smollm", False)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["pre_tokenizer"] = spec["pre_tokenizer"]["pretokenizers"][1]
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    reference, tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path), ours(tmp_path)
    for text in mixed_texts(200):
        assert tokenizer.encode(text, bos=False, eos=False) == reference.encode(text), repr(text)


def test_stop_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "smollm", False, eos_token=None)
    with pytest.raises(ValueError, match="names EOS"):
        read_vocabulary(tmp_path)
    edit(tmp_path / "config.json", eos_token_id=499)
    assert ours(tmp_path).stop_tokens == [499, 497]
    edit(tmp_path / "generation_config.json", eos_token_id=[498, 497])
    assert ours(tmp_path).stop_tokens == [498, 499, 497]  # of both files
    edit(tmp_path / "special_tokens_map.json", eos_token={"content": "<|endoftext|>"})
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ours(tmp_path).eos_id == 497
    edit(tmp_path / "generation_config.json", eos_token_id=[5, 497, 1000])  # 5: an ordinary token
    assert ours(tmp_path).stop_tokens == [497, 499, 5]
    edit(tmp_path / "special_tokens_map.json", eos_token=trained()[0][7])
    assert (ours(tmp_path).eos_id, ours(tmp_path).stop_tokens[0]) == (7, 7)
    edit(tmp_path / "generation_config.json", eos_token_id=["<|im_end|>"])
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be ids"):
        ours(tmp_path)


def test_no_vocabulary(tmp_path: Path) -> None:
    assert read_vocabulary(tmp_path) is None
    write_tokenizer(tmp_path, "smollm", False)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15")  # SentencePiece
    assert read_vocabulary(tmp_path) is not None


def split(pattern: Any, behavior: str = "isolated", invert: bool = False) -> Any:
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, behavior, invert), bytewise])


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        ("model.type", "Unigram", "is a Unigram"),
        ("model.byte_fallback", True, "byte_fallback True"),
        ("model.dropout", 0.1, "dropout"),
        ("model.continuing_subword_prefix", "##", "continuing_subword_prefix"),
        ("model.end_of_word_suffix", "</w>", "end_of_word_suffix"),
        ("model.vocab", None, "damaged"),
        ("normalizer", {"type": "NFC"}, "normalized .NFC"),
        ("pre_tokenizer", None, "pre-tokenizer"),
        ("pre_tokenizer", {"type": "Metaspace"}, "Metaspace"),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "pre-tokenizer"),
        ("pre_tokenizer", split(Regex("a"), "removed"), "pre-tokenizer"),
        ("pre_tokenizer", split(Regex("a"), invert=True), "pre-tokenizer"),
        ("pre_tokenizer", split("a"), "pre-tokenizer"),
        ("pre_tokenizer", "broken", "not a regular expression"),
    ],
)
def test_unsupported_vocabularies(path: str, value: Any, match: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "llama-bpe", False)
    file = tmp_path / "tokenizer.json"
    spec = json.loads(file.read_text())
    if isinstance(value, pre_tokenizers.PreTokenizer):
        value = json.loads(value.__getstate__())
    if value == "broken":
        spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(a"
    else:
        holder = spec
        *parents, key = path.split(".")
        for parent in parents:
            holder = holder[parent]
        holder[key] = value
    file.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=match) as caught:
        read_vocabulary(tmp_path)
    assert str(file) in str(caught.value)


def test_meta_vocabulary_from_transformers_converter(
    llama3_tokenizer_path: Path, tmp_path: Path
) -> None:
    """Meta's file, converted by transformers to tokenizer.json, is read back identically."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = special_token_table("llama3.1", 128000)
    bpe = TikTokenConverter(
        vocab_file=str(llama3_tokenizer_path),
        pattern=LLAMA3_PATTERN,
        extra_special_tokens=list(special),
    ).converted()
    bpe.save(str(tmp_path / "tokenizer.json"))
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    spec["model"]["ignore_merges"] = True  # as in the published files
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    edit(tmp_path / "tokenizer_config.json", eos_token="<|eot_id|>")
    found = read_vocabulary(tmp_path)
    assert found is not None
    ranks, sidecar = found
    assert ranks == llama3_tokenizer_path.read_bytes()
    assert sidecar["pat_str"] == LLAMA3_PATTERN
    assert sidecar["special_tokens"] == special
