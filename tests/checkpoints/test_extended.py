"""checkpoints/extended.py, `llama3 extend-vocab`: new rows and tokens of a checkpoint.

Oracles: arithmetic, the base's logits, transformers, llguidance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.checkpoints.convert import convert, quantize
from llama.checkpoints.extended import mean_row
from llama.checkpoints.open import open_checkpoint, open_tokenizer
from llama.text.rank_file import default_spec
from llama.train.extend_vocabulary import WINDOW, WINDOWS, extend_vocabulary
from tests.checkpoints.gguf_files import (
    PRE_TOKENIZERS,
    VOCAB,
    mixed_texts,
    vocabulary_keys,
    weights,
    write_gguf,
)
from tests.models import TINY, random_weights
from tests.train.test_continued_merges import CHINESE
from tests.vocabularies import rank_file

ROWS, PADDED, NEW = 512, 520, 8
MIXED = [
    "",
    "文件系统",
    CHINESE,
    f"def f(x): return '文件' {CHINESE}",
    "  plain\n\ttext 123",
    "统统 x",
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "zh.txt"
    path.write_text(CHINESE, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def write_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a checkpoint with 256 byte tokens, 256 special tokens and 8 rows without a token."""

    def write(tied: bool = False, **sidecar: Any) -> Path:
        folder = tmp_path_factory.mktemp("base")
        params: dict[str, Any] = TINY | {"vocab_size": PADDED}
        state = random_weights(**params)
        for name in ("tok_embeddings.weight", "output.weight"):
            state[name][ROWS:] = 1e4  # must not count in the mean
        if tied:
            state["output.weight"] = state["tok_embeddings.weight"]
        (folder / "params.json").write_text(json.dumps(params))
        torch.save(state, folder / "consolidated.00.pth")
        (folder / "tokenizer.model").write_bytes(rank_file({bytes([b]): b for b in range(256)}))
        if sidecar:
            spec = json.dumps(default_spec("llama3", 256) | sidecar)
            (folder / "tokenizer.model.json").write_text(spec)
        return folder

    return write


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    llama = Llama.build(folder, max_seq_len=64, max_batch_size=4, device="cpu", dtype="float32")
    with torch.no_grad():
        found: torch.Tensor = llama.model(ids, 0)
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("to", ["meta", "hf"])
def test_old_tokens_lose_at_most_the_new_ones_share(
    tied: bool, to: str, write_base: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    base, out = write_base(tied), tmp_path / "out"
    done = extend_vocabulary(base, [text], out, NEW, scripts=["Han"], initial="mean", to=to)
    assert list(done.tokens.values()) == list(range(PADDED, PADDED + NEW))
    source, old = open_checkpoint(out), open_checkpoint(base)
    assert source.tied == tied
    for name in ("tok_embeddings.weight", "output.weight"):
        w, before = source.read(name), old.read(name)
        assert w.shape == (PADDED + NEW, TINY["dim"])
        assert w[:PADDED].equal(before)
        mean = before[:ROWS].double().mean(0).float()
        torch.testing.assert_close(w[PADDED:], mean.expand(NEW, -1), rtol=0, atol=0)
    ids = torch.randint(0, ROWS, (4, 64))
    before, after = logits(base, ids), logits(out, ids)
    torch.testing.assert_close(
        after[..., :PADDED], before, rtol=0, atol=0 if to == "meta" else 1e-4
    )
    used = torch.ones(PADDED + NEW, dtype=torch.bool)
    used[ROWS:PADDED] = False  # never drawn
    rise = after[..., used].logsumexp(-1) - before[..., :ROWS].logsumexp(-1)
    assert rise.min() > 0
    assert rise.max() <= math.log(1 + NEW / ROWS) + 1e-5
    spec = {"tie_word_embeddings": tied, "vocab_size": PADDED + NEW}
    if to == "hf":
        assert json.loads((out / "config.json").read_text()).items() >= spec.items()


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_parts(
    tied: bool, write_base: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """The old tokens are bytes, so a new token's parts are its bytes."""
    base, out = write_base(tied), tmp_path / "out"
    done = extend_vocabulary(base, [text], out, NEW, initial="parts")
    source, old = open_checkpoint(out), open_checkpoint(base)
    assert source.tied == tied
    for name in ("tok_embeddings.weight", "output.weight"):
        before, after = old.read(name).double(), source.read(name)
        for token, i in done.tokens.items():
            expected = before[list(token)].mean(0).float()
            torch.testing.assert_close(after[i], expected, rtol=0, atol=0)
    # Extended again: the old tokens are new ones of the first time.
    again = extend_vocabulary(out, [text], tmp_path / "again", 3, initial="parts")
    ours, theirs = open_tokenizer(open_checkpoint(again.path)), open_tokenizer(source)
    rows, before = open_checkpoint(again.path).read("output.weight"), source.read("output.weight")
    for token, i in again.tokens.items():
        left, right = next(
            (theirs.ranks[token[:k]], theirs.ranks[token[k:]])
            for k in range(1, len(token))
            if token[:k] in theirs.ranks and token[k:] in theirs.ranks
        )
        if ours.ranks[token] == min(again.tokens.values()):  # made of two old tokens
            torch.testing.assert_close(rows[i], before[[left, right]].double().mean(0).float())


@pytest.mark.parametrize("tied", [False, True])
def test_in_the_mean_state_a_new_token_is_as_probable_as_in_the_text(
    tied: bool, write_base: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    base = write_base(tied)
    parts = extend_vocabulary(base, [text], tmp_path / "parts", NEW, initial="parts")
    done = extend_vocabulary(base, [text], tmp_path / "out", NEW, initial="shares")
    assert done == parts._replace(path=done.path)
    llama = Llama.build(base, max_seq_len=2048, max_batch_size=1, device="cpu")
    ids = torch.tensor(llama.tokenizer.encode(CHINESE, bos=False))
    with torch.no_grad():
        windows = [llama.model.hidden(part[None])[0] for part in ids.split(WINDOW)]
    assert len(windows) <= WINDOWS
    state = torch.cat(windows).double().mean(0)
    old, source = open_checkpoint(tmp_path / "parts"), open_checkpoint(done.path)
    assert source.tied == tied
    before, after = (s.read("output.weight").double() for s in (old, source))
    assert after[:PADDED].equal(before[:PADDED])
    used = [*range(ROWS), *range(PADDED, PADDED + NEW)]
    probabilities = (after[used] @ state).softmax(0)[ROWS:]
    encoded = open_tokenizer(source).encode(CHINESE, bos=False)
    shares = torch.tensor([encoded.count(i) / len(encoded) for i in done.tokens.values()])
    assert shares.min() > 0
    torch.testing.assert_close(probabilities, shares.double(), rtol=1e-2, atol=0)
    moved = (after - before)[PADDED:]  # along the state only, which is computed in bfloat16
    torch.testing.assert_close(
        moved, (moved @ state)[:, None] * state / state.dot(state), rtol=0.02, atol=1e-3
    )
    if not tied:
        name = "tok_embeddings.weight"
        assert source.read(name).equal(old.read(name))


def test_transformers_tokenizes_alike_and_the_import_has_the_same_ids(
    write_base: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    special = default_spec("llama3", 256)["special_tokens"]
    special["<think>"] = special.pop("<|reserved_special_token_9|>")
    found = {"special_tokens": special, "text_tokens": {"<think>": ["lstrip"]}}
    base = write_base(**found, default_system="Hi.")
    extend_vocabulary(base, [text], tmp_path / "meta", NEW)
    convert(tmp_path / "meta", tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "again")
    ours = open_tokenizer(open_checkpoint(tmp_path / "meta"))
    again = open_tokenizer(open_checkpoint(tmp_path / "again"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for part in [*MIXED, "<|begin_of_text|>x", "文件 <think>文", "文" * 3000 + "件" * 3000]:
        ids = ours.encode(part, allowed_special="all")
        assert theirs.encode(part) == ids, part
        assert again.encode(part, allowed_special="all") == ids, part
        assert theirs.decode(ids[1:]) == ours.decode(ids[1:])
        assert ours.decode(ours.encode(part, bos=False)) == part or "think" in part
    assert again.ranks == ours.ranks
    assert again.special_tokens == ours.special_tokens
    assert again.unused_ids == ours.unused_ids == set(range(ROWS, PADDED))
    assert ours.default_system == "Hi."
    assert ours.decode([ROWS, *ours.encode("文件", bos=False)]) == "文件"
    with pytest.raises(ValueError, match=f"no token has the id {PADDED + NEW}"):
        ours.decode([PADDED + NEW])


def test_new_tokens_in_the_engine(
    write_base: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Drawn by a bias, allowed by a grammar; rows without a token never are."""
    done = extend_vocabulary(write_base(), [text], tmp_path / "out", NEW)
    llama = Llama.build(tmp_path / "out", max_seq_len=64, max_batch_size=1, device="cpu")
    new = dict(zip(done.tokens.values(), done.tokens, strict=True))
    token, word = next((i, t.decode()) for i, t in new.items() if len(t) % 3 == 0)
    [answer] = llama.text_completion(["x"], max_gen_len=3, temperature=0, logit_bias={token: 100.0})
    assert answer["generation"] == word * 3
    [answer] = llama.text_completion(
        ["x"],
        max_gen_len=30,
        temperature=0,
        logit_bias={token: 90.0},
        grammar=llama.regex_grammar(f"({word}){{2}}"),
    )
    assert answer["generation"] == word * 2
    with pytest.raises(ValueError, match=f"ids are 0 to {PADDED + NEW - 1}"):
        llama.text_completion(["x"], max_gen_len=3, logit_bias={PADDED + NEW: 1.0})
    pad = dict.fromkeys(range(ROWS, PADDED), 100.0)
    ids = llama.generate([[1]], max_gen_len=20, temperature=1.0, seed=1, logit_bias=pad)[0]
    assert not set(range(ROWS, PADDED)) & set(ids[0])


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_gguf_base(pre: str, text: Path, tmp_path: Path) -> None:
    """It becomes bf16, and transformers tokenizes the result alike."""
    transformers = pytest.importorskip("transformers")
    base = write_gguf(tmp_path / "base.gguf", weights(), vocabulary_keys(pre))
    text.write_text(CHINESE + " " + " ".join(mixed_texts(20)), encoding="utf-8")
    done = extend_vocabulary(base, [text], tmp_path / "out", NEW, scripts=["all"], to="hf")
    source = open_checkpoint(done.path)
    ours, theirs = open_tokenizer(source), transformers.AutoTokenizer.from_pretrained(done.path)
    for part in [*MIXED, *mixed_texts(50)]:
        assert ours.encode(part) == theirs.encode(part), part
    assert (ours.n_words, source.dtype("output.weight")) == (VOCAB + NEW, torch.bfloat16)
    assert (ours.bos_id, ours.stop_tokens) == (498 if pre == "llama-bpe" else -1, [499, 497])
    assert ours.chat_format == "chatml"


def test_bad_input(write_base: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    base, out = write_base(), tmp_path / "out"
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("")
    latin.write_bytes("fichier créé".encode("latin-1"))
    bare = write_base()
    (bare / "tokenizer.model").unlink()
    quantize(base, tmp_path / "int8", "int8")
    broken = write_base()
    state = torch.load(broken / "consolidated.00.pth")
    state["norm.weight"][0] = math.nan
    torch.save(state, broken / "consolidated.00.pth")
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "empty", {"data": [empty]}),
        (ValueError, "UTF-8", {"data": [latin]}),
        (FileNotFoundError, "nowhere", {"data": [tmp_path / "nowhere.txt"]}),
        (ValueError, "tokens must be 1 or more, not 0", {"n": 0}),
        (ValueError, r"no more than \d+ new tokens, not 100000", {"n": 100000}),
        (ValueError, "Unicode has no script 'Chinese'", {"scripts": ["Chinese"]}),
        (ValueError, "no script", {"scripts": []}),
        (ValueError, "initial must be one of mean, parts, shares, not 'zero'", {"initial": "zero"}),
        (ValueError, "cannot write 'gguf'", {"to": "gguf"}),
        (FileNotFoundError, "has no tokenizer", {"base": bare}),
        (ValueError, "its states are NaN or infinite; run `llama3 verify`", {"base": broken}),
        (ValueError, "quantized already", {"base": tmp_path / "int8"}),
        (FileExistsError, "exists already", {"out": text}),
        (FileNotFoundError, "nowhere", {"base": tmp_path / "nowhere"}),
    ]
    for error, message, change in wrong:
        values: dict[str, Any] = {
            "base": base,
            "data": [text],
            "out": out,
            "n": NEW,
            "scripts": ["Han"],
        } | change
        with pytest.raises(error, match=message):
            extend_vocabulary(**values)
        assert not out.exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_mean_of_many_rows_is_exact() -> None:
    w = torch.full((20000, 2), 1.1, dtype=torch.bfloat16)
    w[7] = float("inf")
    assert mean_row(w, {7}).tolist() == [float(w[0, 0])] * 2
    with pytest.raises(ValueError, match="NaN or infinite"):
        mean_row(w, set())
