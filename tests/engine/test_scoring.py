"""Scoring: every token is scored once, with the value of one pass over its window."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llama import Llama
from llama.engine.engine import Engine
from llama.engine.request import Request
from llama.engine.scoring import Perplexity, check_windows, read_text, windows


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Callable[..., Path], llama3_tokenizer_path: Path) -> Llama:
    """64 positions, 3 rows."""
    folder = tiny_checkpoint()
    return Llama.build(folder, llama3_tokenizer_path, 64, 3, device="cpu", dtype=torch.float32)


def one_pass(llama: Llama, ids: list[int]) -> list[float]:
    """Scores of ids 1, 2, ...: the whole sequence through the model at once, without a cache."""
    with torch.no_grad():
        raw = torch.log_softmax(llama.model(torch.tensor([ids]))[0], -1)
    return [raw[i, token].item() for i, token in enumerate(ids[1:])]


def test_windows_score_each_id_once() -> None:
    for length in range(1, 40):
        for context in range(2, 12):
            for stride in range(1, context):
                found = windows(length, context, stride)
                assert [i for _, scored, end in found for i in range(scored, end)] == list(
                    range(length)
                )
                assert all(end - begin <= context for begin, _, end in found)
                assert all(scored - begin >= context - stride for begin, scored, _ in found[1:])


def test_decoding_scores_as_one_pass_does(tiny: Llama) -> None:
    """Log-probabilities of each step against those of the whole text."""
    prompts = [[128000, 9, 8, 7], [128000, *range(500, 540)]]
    ids, stepwise = tiny.generate(prompts, 20, temperature=1.0, logprobs=True, echo=True)
    assert stepwise is not None
    for row, got in zip(ids, stepwise, strict=True):
        assert got[0] is None and got[1:] == pytest.approx(one_pass(tiny, row), abs=1e-4)


def test_a_scored_request_builds_upon_what_it_need_not_score(tiny: Llama) -> None:
    ids = [128000, *range(500, 550)]
    want = [None, *one_pass(tiny, ids)]
    for start, reused in ((0, 0), (1, 0), (30, 29), (50, 49), (60, 50)):
        engine = Engine(tiny.model)
        engine.run([Request([*ids, 9, 9], 0, score_from=0)])
        [found] = engine.run([Request(ids, 0, score_from=start)])
        assert found.reused == reused
        unscored = min(max(start, 1), len(ids))
        assert found.prompt_logprobs[:unscored] == [None] * unscored
        assert found.prompt_logprobs[unscored:] == pytest.approx(want[unscored:], abs=1e-4)
        [alone] = engine.run([Request(ids, 0, score_from=start, reuse=False)])
        assert alone.reused == 0


def test_score(tiny: Llama) -> None:
    texts = ["Hello there", "x", "one two three " * 60]
    short, single, long = tiny.score(texts)
    for text, result in zip(texts[:2], (short, single), strict=True):
        ids = tiny.tokenizer.encode(text, bos=True, eos=False)
        assert result["tokens"] == [tiny.tokenizer.decode([t]) for t in ids]
        assert result["logprobs"][1:] == pytest.approx(one_pass(tiny, ids), abs=1e-4)
    ids = tiny.tokenizer.encode(texts[2], bos=True, eos=False)
    assert len(ids) > 150 and len(long["logprobs"]) == len(ids)
    assert None not in long["logprobs"][1:]
    # The second window: BOS in front, ids 33 to 95, of which those from 64 on are new.
    window = [ids[0], *ids[33:96]]
    assert long["logprobs"][64:96] == pytest.approx(one_pass(tiny, window)[31:], abs=1e-4)
    with pytest.raises(TypeError, match="list of texts"):
        tiny.score("Hello")


def test_perplexity(tiny: Llama) -> None:
    text = "Grüße aus Köln"
    ids = tiny.tokenizer.encode(text, bos=True, eos=False)
    known = one_pass(tiny, ids)
    result = tiny.perplexity(text)
    assert result.perplexity == pytest.approx(math.exp(-sum(known) / len(known)), rel=1e-4)
    bits = -sum(known) / math.log(2) / len(text.encode())
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-4)
    assert (result.tokens, result.size) == (len(known), len(text.encode()))
    whole = tiny.perplexity("one two three " * 60, stride=8)
    assert whole.tokens == len(tiny.tokenizer.encode("one two three " * 60, bos=False, eos=False))
    for stride in (0, 64, 1.5):
        with pytest.raises(ValueError, match="stride must be 1 to 63"):
            tiny.perplexity(text, stride=stride)  # type: ignore[arg-type]


def test_perplexity_of_a_hopeless_model_is_infinite(tiny: Llama) -> None:
    """Logits of a model whose output layer is 10,000 times too large."""
    weight = tiny.model.output.weight
    assert isinstance(weight, torch.Tensor)
    before = weight.detach().clone()
    try:
        weight.data *= 10_000
        result = tiny.perplexity("Grüße aus Köln")
    finally:
        weight.data = before
    assert result.nats / result.tokens > 1000 and result.perplexity == math.inf
    assert str(result).startswith("perplexity infinity, ") and "bits per byte" in str(result)
    found = json.loads(result.as_json(), parse_constant=pytest.fail)
    assert found["perplexity"] is None and found["nats"] == result.nats
    assert Perplexity(1, math.inf, 1, 1.0).bits_per_byte == math.inf
    assert json.loads(Perplexity(1, math.inf, 1, 1.0).as_json())["bits_per_byte"] is None


def test_command(demo_dir: Path, tmp_path: Path) -> None:
    """One success and one error; messages of other errors are below."""
    text = tmp_path / "text.txt"
    text.write_text("The sun rises in the east and sets in the west. " * 8, "utf-8")

    def perplexity(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llama", "perplexity", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == code, done.stderr
        return done

    result = json.loads(perplexity(str(text), "--max_seq_len", "64", "--json").stdout)
    assert 1 < result["perplexity"] < 4 and result["size"] == text.stat().st_size
    (tmp_path / "image").write_bytes(b"\xff\xd8\xff")
    refused = perplexity(str(tmp_path / "image"), "--max_seq_len", "64", code=2)
    assert "not text in UTF-8" in refused.stderr and "Traceback" not in refused.stderr


def test_files_that_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="image is not text in UTF-8"):
        read_text(tmp_path / "image")
    with pytest.raises(ValueError, match="empty is empty"):
        read_text(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="No such file"):
        read_text(tmp_path / "absent")


def test_bad_windows() -> None:
    assert (check_windows(64, None), check_windows(64, 63)) == (32, 63)
    for context in (1, 0, 2.5, True):
        with pytest.raises(ValueError, match="context must be 2 or more"):
            check_windows(context, None)  # type: ignore[arg-type]
    for stride in (64, 0, 1.5):
        with pytest.raises(ValueError, match="stride must be 1 to 63"):
            check_windows(64, stride)  # type: ignore[arg-type]
