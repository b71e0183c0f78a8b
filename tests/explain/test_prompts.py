"""Prompts of each kind, those that are too long, and mistakes."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama import Llama
from llama.distributed import tensor_parallel
from llama.explain import compute as computing
from llama.explain.text import quoted
from llama.explain.trace import Trace
from tests.explain.test_trace import IDS, build, near, tiny, trace

__all__ = ["tiny", "trace"]


def test_a_long_prompt_is_bounded(tiny: Llama, trace: Trace, caplog: Any) -> None:
    """The first tokens have the numbers that they have in the whole prompt."""
    with caplog.at_level(logging.WARNING, "llama"):
        short = tiny.explain(IDS, max_tokens=5)
    assert "Of the prompt's 8 tokens, only the first 5 are explained" in caplog.text
    assert short.ids == IDS[:5] and short.total == 8
    near(short.attention, trace.attention[:, :, :5, :5], 1e-6)
    near(short.logits, trace.logits[:5], 1e-5)
    assert "The first 5 of the prompt's 8 tokens; raise max_tokens to see more." in str(short)
    beyond = tiny.explain([1] * 70)
    assert len(beyond.ids) == 64 and beyond.limit == "build with a larger max_seq_len to see more"


def test_memory_bounds_the_tokens(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computing, "MAX_BYTES", 4 * (2 * 4 * 6 * 6 + 512 * 6))
    trace = tiny.explain(IDS)
    assert len(trace.ids) == 6 and "weights of attention and logits" in trace.limit


def test_prompts_of_each_kind(tiny: Llama) -> None:
    dialog: Any = [{"role": "user", "content": "Hi"}]
    trace = tiny.explain(dialog)
    assert tiny.formatter is not None
    assert trace.ids == tiny.formatter.encode_dialog_prompt(dialog) and any(trace.special)
    assert tiny.explain("Hi").ids == tiny.tokenizer.encode("Hi")
    assert repr(trace).startswith("Trace(") and "logit lens" in str(trace)


def test_the_text_shows_the_prompt_and_the_name(tiny: Llama) -> None:
    lines = str(tiny.explain("a long\ntext", name="my\x1bmodel")).splitlines()
    assert lines[:2] == ["model: my\\x1bmodel", 'prompt: "a long\\ntext"']
    assert quoted("x" * 300, 200) == '"' + "x" * 200 + '..."'
    assert str(tiny.explain("Hi")).startswith('prompt: "Hi"\n')
    assert "for 1 position" in str(tiny.explain(""))


def test_parts_have_rows_of_their_own(tiny: Llama, trace: Trace) -> None:
    weights = tiny.model.norm.weight.numel()
    rows = [line.split() for line in str(trace).splitlines() if line.startswith("final norm")]
    assert [row[2] for row in rows if row[4] == "B"] == [str(weights)]


def test_ids_of_numpy(tiny: Llama) -> None:
    numbers: Any = [np.int64(i) for i in IDS]
    assert len(tiny.explain(numbers).to_html()) > 1000


def test_one_token_and_an_empty_text(tiny: Llama) -> None:
    trace = tiny.explain("")  # BOS alone
    assert trace.ids == [tiny.tokenizer.bos_id] and trace.attention.tolist() == [[[[1.0]]] * 4] * 2
    assert len(trace.frequencies) == 8 and "next token" in str(trace)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "no tokens; give at least one"),
        ([512], {}, "no token has the id 512; use 0 to 511"),
        ([-1], {}, "no token has the id -1"),
        ([1.5], {}, "not a token id"),
        (7, {}, "a text, a dialog .* or a list of token ids, and not int$"),
        (None, {}, "and not NoneType$"),
        (b"text", {}, r"and not bytes; give its .decode\(\)"),
        (np.array(IDS), {}, r"and not ndarray; give its .tolist\(\)"),
        (torch.tensor(IDS), {}, r"and not Tensor; give its .tolist\(\)"),
        ("a\ud800", {}, "not text in UTF-8: character 1 is a lone surrogate"),
        ({"role": "user", "content": "Hi"}, {}, "for one message give"),
        (IDS, {"max_tokens": 0}, "max_tokens must be 1 to 4096, not 0"),
        (IDS, {"max_tokens": 5000}, "max_tokens must be 1 to 4096"),
        (IDS, {"top_p": 2}, "top_p must lie between 0 and 1"),
        (IDS, {"adapter": "x"}, "there is no adapter 'x'"),
    ],
)
def test_mistakes(tiny: Llama, prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        tiny.explain(prompt, **options)


def test_several_ranks_are_refused(tiny: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_parallel, "size", lambda: 2)
    with pytest.raises(ValueError, match="explain runs on one rank"):
        tiny.explain(IDS)


def test_logits_that_are_not_finite(folder: Path, byte_tokenizer_path: Path) -> None:
    with build(folder, byte_tokenizer_path) as llama:
        llama.model.norm.weight.data.fill_(math.inf)
        with pytest.raises(ValueError, match="not finite numbers; build it with dtype='fp32'"):
            llama.explain(IDS)
