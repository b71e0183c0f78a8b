"""Models with more rows of embeddings than tokens, or fewer: one check for every verb.

Oracle: transformers, with the ids without a token suppressed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from llama import Llama, ModelArgs, Tokenizer, Transformer
from llama.checkpoints.convert import convert, quantize
from llama.commands.checkpoints import inspect, verify
from tests.checkpoints.gguf_files import vocabulary_keys, weights, write_gguf
from tests.checkpoints.test_hf import hf_model
from tests.checkpoints.test_hf_files import write_tokenizer
from tests.test_tokenizer import SIDECAR, write_small

transformers = pytest.importorskip("transformers")

TOKENS = 500  # of the vocabulary that `write_tokenizer` writes


def write_model(folder: Path, rows: int, added: tuple[str, ...] = ()) -> Any:
    """A model of transformers, whose rows without a token would be drawn first."""
    model = hf_model(vocab_size=rows)
    model.lm_head.weight.data[TOKENS:] *= 10
    model.save_pretrained(folder)
    write_tokenizer(folder, "llama-bpe", bos=True)
    tokenizer = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in added])
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def build(folder: Path) -> Llama:
    return Llama.build(folder, None, 64, 2, device="cpu", dtype="fp32")


def verbs(folder: Path) -> dict[str, Callable[[], object]]:
    out = folder.parent / "out"
    return {
        "build": lambda: build(folder),
        "inspect": lambda: inspect(str(folder)),
        "convert to meta": lambda: convert(folder, out / "meta"),
        "convert to hf": lambda: convert(folder, out / "hf", to="hf"),
        "quantize": lambda: quantize(folder, out / "int8", "int8"),
        "verify": lambda: verify(str(folder)),
    }


def test_a_tokenizer_whose_fit_was_not_checked(tmp_path: Path) -> None:
    """Ids without a token, below the highest token and above, of a tokenizer that stands alone."""
    sidecar = SIDECAR | {"unused_ids": [261, 263]}
    sidecar["special_tokens"] = SIDECAR["special_tokens"] | {"<x>": 262}
    tokenizer = Tokenizer(write_small(tmp_path, sidecar))
    assert tokenizer.n_words == 263
    with pytest.raises(ValueError, match="no token has the id 264; use 0 to 263"):
        tokenizer.decode([264])
    llama = Llama(Transformer(ModelArgs(dim=16, n_layers=1, n_heads=2, vocab_size=266)), tokenizer)
    assert llama.model.unused is not None and llama.model.unused.tolist() == [261, 263, 264, 265]
    assert tokenizer.decode([97, 261, 263, 264, 265, 98]) == "ab"


@pytest.mark.parametrize("rows", [507, 512])
def test_rows_without_a_token(
    rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "m", rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for verb in verbs(tmp_path / "m").values():
            verb()
    assert f"500 tokens, {rows} rows of embeddings" in capsys.readouterr().out
    prompt = [498, 5, 6, 7]
    expected = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=list(range(TOKENS, rows)),
    )[0, 4:].tolist()
    for folder in (tmp_path / "m", tmp_path / "out" / "meta", tmp_path / "out" / "hf"):
        llama = build(folder)
        llama.tokenizer.stop_tokens = []
        ids, logprobs = llama.generate([prompt], 20, temperature=0.0, logprobs=True)
        assert ids == [expected]
    with torch.no_grad():  # log-probabilities are of the raw distribution, over all rows
        raw = model(torch.tensor([prompt + expected])).logits.log_softmax(-1)[0, 3:-1]
    assert logprobs is not None
    torch.testing.assert_close(
        torch.tensor(logprobs[0]), raw.gather(1, torch.tensor([expected]).T)[:, 0]
    )
    drawn, _ = llama.generate([prompt] * 2, 50, temperature=9.0, top_p=1.0, seed=3)
    assert len(drawn[0]) == 50 and max(map(max, drawn)) < TOKENS
    assert llama.tokenizer.decode([5, rows - 1, 6]) == llama.tokenizer.decode([5, 6])
    with pytest.raises(ValueError, match=f"no token has the id {rows};"):
        llama.tokenizer.decode([rows])


def test_rows_without_a_token_may_hold_anything(tmp_path: Path) -> None:
    model = write_model(tmp_path / "m", 507)
    expected = build(tmp_path / "m").generate([[5, 6]], 9, temperature=0.0)
    with torch.no_grad():
        model.lm_head.weight[TOKENS:] = torch.nan
        model.lm_head.weight[506] = torch.inf
    model.save_pretrained(tmp_path / "m")
    llama = build(tmp_path / "m")
    assert llama.generate([[5, 6]], 9, temperature=0.0) == expected
    llama.tokenizer.stop_tokens = []
    assert len(llama.generate([[5, 6]], 30, seed=1)[0][0]) == 30


def test_tokens_without_a_row(tmp_path: Path) -> None:
    write_model(tmp_path / "m", TOKENS, added=("[PAD]",))
    for name, verb in verbs(tmp_path / "m").items():
        with pytest.warns(UserWarning) as caught:
            verb()
        [warning] = caught.list
        assert r"500 rows: it cannot be given [PAD] (500)" in str(warning.message), name
    for folder in (tmp_path / "m", tmp_path / "out" / "meta", tmp_path / "out" / "hf"):
        with pytest.warns(UserWarning, match="cannot be given"):
            llama = build(folder)
        assert llama.tokenizer.special_tokens["[PAD]"] == TOKENS
        assert len(llama.generate([[5, 6]], 5, temperature=0.0)[0][0]) <= 5
        with pytest.raises(ValueError, match="holds the token id 500; ids are 0 to 499"):
            llama.generate([[5, 500]], 5)


def test_hole_in_the_ids(tmp_path: Path) -> None:
    """An id between two tokens that has no token."""
    model = write_model(tmp_path / "m", 503)
    path = tmp_path / "m" / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["added_tokens"].append(spec["added_tokens"][-1] | {"content": "<last>", "id": 502})
    path.write_text(json.dumps(spec))
    with torch.no_grad():
        first = model(torch.tensor([[498, 5]])).logits[0, -1]
    first[[500, 501]] = -torch.inf
    llama = build(tmp_path / "m")
    llama.tokenizer.stop_tokens = []
    assert llama.generate([[498, 5]], 1, temperature=0.0)[0] == [[int(first.argmax())]]
    assert llama.tokenizer.decode([501, 502, 500]) == "<last>"


@pytest.mark.parametrize("rows", [300, 3000])
def test_tokenizer_of_another_model(rows: int, tmp_path: Path) -> None:
    write_model(tmp_path / "m", rows)
    message = f"has 500 tokens and the model {rows}; give the tokenizer.model"
    for name, verb in verbs(tmp_path / "m").items():
        with pytest.raises((ValueError, SystemExit)) as caught:
            verb()
        assert message in str(caught.value) or name == "verify"
    assert not any((tmp_path / "out").glob("*"))


def test_gguf_with_a_token_without_a_row(tmp_path: Path) -> None:
    special = {"<|endoftext|>": 497, "<|im_start|>": 498, "<|im_end|>": 499, "[PAD]": 500}
    write_gguf(tmp_path / "m.gguf", keys=vocabulary_keys("llama-bpe", special))
    for verb in verbs(tmp_path / "m.gguf").values():
        with pytest.warns(UserWarning, match=r"it cannot be given \[PAD\] \(500\)"):
            verb()


@pytest.mark.parametrize("padding", [0, 12])
def test_gguf_with_padded_rows(padding: int, tmp_path: Path) -> None:
    """With tokens of type UNUSED for the padding, as converters write them, or without."""
    path = tmp_path / "m.gguf"
    keys = vocabulary_keys("llama-bpe")
    keys["tokenizer.ggml.tokens"] += [f"[PAD{i}]" for i in range(500, 500 + padding)]
    keys["tokenizer.ggml.token_type"] += [5] * padding
    write_gguf(path, weights(vocab=512), keys=keys | {"llama.vocab_size": 500 + padding})
    llama = build(path)
    drawn, _ = llama.generate([[5]], 60, temperature=9.0, top_p=1.0, seed=3)
    assert max(drawn[0]) < TOKENS and llama.tokenizer.decode([511]) == ""
