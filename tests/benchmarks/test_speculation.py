"""The benchmark of speculation: the widened model is the narrow one, and each command reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import speculation, widened_model
from llama import Llama
from llama.checkpoints.load import load_model
from llama.checkpoints.open import open_checkpoint

CPU = torch.device("cpu")


def test_the_widened_model_computes_the_same(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widened_model, "HIDDEN", 192)
    monkeypatch.setattr(widened_model, "VOCABULARY", 600)
    folder = tiny_checkpoint(vocab_size=512)
    state = torch.load(folder / "consolidated.00.pth")
    state["output.weight"] = state["tok_embeddings.weight"]
    torch.save(state, folder / "consolidated.00.pth")
    source = open_checkpoint(folder)
    narrow = load_model(source, source.args(max_seq_len=32, max_batch_size=1), CPU, torch.bfloat16)
    wide = widened_model.widened(folder, 32)
    assert wide.params.dim == 4 * narrow.params.dim
    assert wide.layers[0].feed_forward.w1.weight.shape == (192, 256)  # type: ignore[union-attr]
    tokens = torch.arange(20).unsqueeze(0) * 7
    with torch.no_grad():
        want, found = narrow.float()(tokens), wide.float()(tokens)
    torch.testing.assert_close(found[..., :512], want, rtol=1e-4, atol=1e-4)
    assert not found[..., 512:].any()


def test_each_command_reports(
    folder: Path,
    byte_tokenizer_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    llama = Llama.build(folder, byte_tokenizer_path, 512, 1, device="cpu", dtype="fp32")
    monkeypatch.setattr(speculation, "ROOM", 512)
    monkeypatch.setattr(speculation, "build", lambda *_: (llama.model, llama.tokenizer))
    monkeypatch.setattr(speculation, "ids_of", lambda *_: [1, 2, 3] * 9)
    speculation.answers(dtype="float32", new=4, rounds=1)
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    found = {(f["row"], f["column"]): f["median"] for f in result["figures"]}
    assert found["editing code", "tokens"] == 4 and found["editing code", "ratio"] > 0
    gains = [x for (row, column), x in found.items() if column == speculation.GAIN]
    assert found["ordinary: lowest", speculation.GAIN] in gains and min(gains) > 0
    speculation.costs(dtype="float32", seconds=0.01)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [f["row"] for f in result["figures"][::2]] == [
        f"135m float32, {n} position{'s' * (n > 1)}" for n in (1, 2, 4, 8, 16)
    ]
    with pytest.raises(ValueError, match="there is no prompt 'x'; use repeating or ordinary"):
        speculation.answers(prompts="x")
    with pytest.raises(ValueError, match="unknown size '3b'; use 135m or 1b"):
        speculation.costs(size="3b")
