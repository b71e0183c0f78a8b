"""calibration.py: each linear is quantized with the inputs that it has in the quantized model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llama.checkpoints.calibration import Calibration, calibrated_weights, cut_windows
from llama.checkpoints.convert import quantize
from llama.checkpoints.load import load_model
from llama.checkpoints.open import open_checkpoint
from llama.checkpoints.verify import verify
from llama.layers.blocks import dequantize_blocks, quantize_blocks
from llama.layers.gptq import inverse_factor
from llama.layers.schemes import SCHEMES
from llama.model import Transformer
from llama.tokenizer import Tokenizer
from tests.checkpoints import gguf_files

Tiny = Callable[..., Path]
INT4 = SCHEMES["int4"]
CPU = torch.device("cpu")
PTH = "consolidated.00.pth"
SMALL = Calibration("The quick brown fox jumps over the lazy dog. " * 40, 8, 64)
IDS = torch.randint(0, 300, (5, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tiny_checkpoint: Tiny, byte_tokenizer_path: Path) -> Path:
    folder = tiny_checkpoint(vocab_size=512, multiple_of=64)
    shutil.copyfile(byte_tokenizer_path, folder / "tokenizer.model")
    return folder


def dequantized(path: Path, weights: dict[str, Tensor]) -> Transformer:
    """The plain model at `path` with the weights of stored blocks."""
    source = open_checkpoint(path)
    model = load_model(source, source.args(max_seq_len=64), CPU, torch.float32)
    for name, w in weights.items():
        if name.endswith(".blocks"):
            linear = model.get_submodule(name.removesuffix(".blocks"))
            rows = dequantize_blocks(w, len(linear.weight))  # type: ignore[arg-type]
            linear.weight = torch.nn.Parameter(rows, requires_grad=False)
    return model


def test_windows(byte_tokenizer_path: Path) -> None:
    """Of 1,000 ids, the first and the last window are at the ends; all begin with the begin id."""
    tokenizer = Tokenizer(byte_tokenizer_path)
    text = "".join(chr(32 + i * 7 % 90) for i in range(1000))
    rows = cut_windows(Calibration(text, windows=4, max_seq_len=101), tokenizer, 8192)
    assert rows.shape == (4, 101) and (rows[:, 0] == tokenizer.bos_id).all()
    parts = ["".join(map(chr, row[1:].tolist())) for row in rows]
    assert parts == [text[i : i + 100] for i in (0, 300, 600, 900)]
    assert len(cut_windows(Calibration(text, max_seq_len=101), tokenizer, 8192)) == 10
    assert cut_windows(Calibration(text), tokenizer, 64).shape == (15, 64)


@torch.inference_mode()
def test_inputs_are_those_of_the_quantized_model(folder: Path) -> None:
    """Every factor is that of the inputs which hooks see in the model with dequantized weights."""
    factors: list[Tensor] = []

    def rounding(w: Tensor, factor: Tensor, bits: int) -> Tensor:
        factors.append(factor)
        return quantize_blocks(w, bits)

    source = open_checkpoint(folder)
    weights = dict(calibrated_weights(source, None, INT4, IDS, rounding))
    model = dequantized(folder, weights)
    inputs: list[Tensor] = []
    for linear in model.modules():  # hooks run in the order in which linears are quantized
        if isinstance(linear, torch.nn.Linear):
            linear.register_forward_pre_hook(lambda _, x: inputs.append(x[0].flatten(0, 1)))
    model(IDS)
    assert len(factors) == len(inputs) == 2 * 7 + 1
    for factor, x in zip(factors, inputs, strict=True):
        expected = inverse_factor(x.T @ x)
        torch.testing.assert_close(factor, expected, atol=2e-3, rtol=2e-3)


def gguf(tmp_path: Path, tied: bool) -> Path:
    return gguf_files.write_gguf(tmp_path / "m.gguf", gguf_files.weights(tied))


@pytest.mark.parametrize("kind", ["meta", "meta tied", "gguf tied"])
@torch.inference_mode()
def test_logits_are_closer_than_of_plain_quantization(
    kind: str, folder: Path, tmp_path: Path
) -> None:
    path = gguf(tmp_path, "tied" in kind) if "gguf" in kind else folder
    if kind == "meta tied":
        weights = torch.load(folder / PTH, weights_only=True)
        weights["output.weight"] = weights["tok_embeddings.weight"]
        torch.save(weights, folder / PTH)
    source = open_checkpoint(path)
    dtype = torch.bfloat16 if "gguf" in kind else None
    exact = dequantized(path, {})(IDS)
    errors = []
    for rounding in ({}, {"rounding": lambda w, factor, bits: quantize_blocks(w, bits)}):
        found = dict(calibrated_weights(source, dtype, INT4, IDS, **rounding))
        errors.append(float((dequantized(path, found)(IDS) - exact).square().mean()))
    assert errors[0] < 0.6 * errors[1]


def test_folder(folder: Path, tmp_path: Path) -> None:
    """An ordinary quantized checkpoint, the same each time."""
    plain = quantize(folder, tmp_path / "plain", "int4")
    first, second = (quantize(folder, tmp_path / n, "int4", SMALL) for n in ("first", "second"))
    assert not verify(first, open_checkpoint)
    assert {p.name for p in first.iterdir()} == {p.name for p in plain.iterdir()}
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
        if path.name != PTH:
            assert path.read_bytes() == (plain / path.name).read_bytes()
    stored, expected = (torch.load(p / PTH, weights_only=True) for p in (first, plain))
    assert list(stored) == list(expected)
    for name, w in stored.items():
        assert (w.shape, w.dtype) == (expected[name].shape, expected[name].dtype)
        assert torch.equal(w, expected[name]) == (not name.endswith(".blocks"))


def test_impossible(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind."""
    out = tmp_path / "out"

    def fails(error: type[Exception], match: str, *arguments: Any) -> None:
        with pytest.raises(error, match=match):
            quantize(folder, out, *arguments)
        assert not list(tmp_path.iterdir())

    fails(ValueError, "a calibration is for int4; int8 loses too little", "int8", SMALL)
    fails(TypeError, r"calibration must be a Calibration\(text\), not 64", "int4", 64)
    short = Calibration("Hello", max_seq_len=64)
    fails(ValueError, "text has 5 tokens, and a window needs 63; give more", "int4", short)
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "2")
        fails(ValueError, "one process: call it without torchrun", "int4", SMALL)
    (folder / "tokenizer.model").rename(folder / "elsewhere")
    fails(FileNotFoundError, r"no tokenizer, .*; add its tokenizer\.model", "int4", SMALL)
    (folder / "elsewhere").rename(folder / "tokenizer.model")
    weights = torch.load(folder / PTH, weights_only=True)
    for name in ("layers.1.feed_forward.w2.weight", "tok_embeddings.weight"):
        damaged = weights | {name: weights[name].clone()}
        damaged[name][3, 5] = float("nan")
        torch.save(damaged, folder / PTH)
        fails(ValueError, f"{name} of .* has NaN or infinite numbers", "int4", SMALL)
    weights["layers.1.attention_norm.weight"] *= 1e30
    torch.save(weights, folder / PTH)
    fails(ValueError, r"layers\.1\.attention\.wq: its inputs are NaN or infinite", "int4", SMALL)
    for options in ({"windows": 0}, {"max_seq_len": 1}, {"windows": 2.5}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be . or more, not"):
            Calibration("x", **options)


def test_no_inputs(folder: Path, tmp_path: Path) -> None:
    """A layer whose norm is zero: its linears read zeros, and are quantized plainly."""
    weights = torch.load(folder / PTH, weights_only=True)
    weights["layers.0.attention_norm.weight"].zero_()
    torch.save(weights, folder / PTH)
    plain = quantize(folder, tmp_path / "a", "int4")
    found = quantize(folder, tmp_path / "b", "int4", SMALL)
    a, b = (torch.load(path / PTH, weights_only=True) for path in (plain, found))
    assert torch.equal(a["layers.0.attention.wq.blocks"], b["layers.0.attention.wq.blocks"])
    assert json.loads((found / "params.json").read_text())["quantization"]["scheme"] == "int4"
