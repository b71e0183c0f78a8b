"""What a calibration of int4 gains: perplexity of a model quantized in three ways.

    python -m benchmarks.calibration SRC --calibrate FILE --test OTHER_FILE

`rounded`: each weight by itself, as `llama3 quantize` without a calibration. `weighted`: grids
that fit best where the inputs of the calibration's text are large. `calibrated`: as `llama3
quantize --calibrate`. The weights are dequantized for the measurement, so that it is about the
weights alone; activations are in the stored dtype.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report import Figure, finish, make_result
from benchmarks.script import run_benchmark
from llama.checkpoints.calibration import Calibration, Rounding, calibrated_weights, cut_windows
from llama.checkpoints.load import load_model
from llama.checkpoints.open import open_checkpoint, open_tokenizer
from llama.checkpoints.source import Source
from llama.engine.scoring import read_text
from llama.layers.blocks import dequantize_blocks, quantize_blocks
from llama.layers.gptq import compensated_blocks
from llama.layers.schemes import SCHEMES
from llama.model import Transformer


def rounded(w: Tensor, factor: Tensor, bits: int) -> Tensor:
    """The blocks without a calibration."""
    return quantize_blocks(w, bits)


def weighted(w: Tensor, factor: Tensor, bits: int) -> Tensor:
    """The squared error of a column costs the mean square of its input."""
    moments = torch.cholesky_inverse(factor, upper=True)
    return quantize_blocks(w, bits, moments.diagonal())


ARMS: dict[str, Rounding | None] = {
    "not quantized": None,
    "rounded": rounded,
    "weighted": weighted,
    "calibrated": compensated_blocks,
}


def quantized_model(source: Source, ids: Tensor, rounding: Rounding | None) -> Transformer:
    """The model with quantized and dequantized weights; None: as it is."""
    args = source.args(max_seq_len=ids.shape[1])
    model = load_model(source, args, torch.device("cpu"), source.dtype("tok_embeddings.weight"))
    if rounding is None:
        return model
    for name, w in calibrated_weights(source, None, SCHEMES["int4"], ids, rounding):
        if name.endswith(".blocks"):
            linear = model.get_submodule(name.removesuffix(".blocks"))
            assert isinstance(linear, nn.Linear)
            rows = dequantize_blocks(w, linear.out_features).to(linear.weight.dtype)
            linear.weight = nn.Parameter(rows, requires_grad=False)
    return model


def perplexity(model: Transformer, ids: Tensor) -> float:
    """Of windows (B, T), each by itself; its first id is not predicted."""
    nats = 0.0
    for rows in ids.split(4):
        logits = model.logits(model.hidden(rows)[:, :-1])
        nats += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return math.exp(nats / ids[:, 1:].numel())


@torch.inference_mode()
def calibration(
    src: str,
    *,
    calibrate: str,
    test: str,
    windows: int = 32,
    test_windows: int = 32,
    max_seq_len: int = 512,
    out: str | None = None,
) -> None:
    """Quantize SRC in each way and print its perplexity on another text."""
    settings: dict[str, Any] = {
        "calibrate": calibrate,
        "windows": windows,
        "max_seq_len": max_seq_len,
    }
    settings |= {"test": test, "test_windows": test_windows}
    source = open_checkpoint(src)
    tokenizer = open_tokenizer(source)
    texts = ((calibrate, windows), (test, test_windows))
    ids, unseen = (
        cut_windows(Calibration(read_text(path), n, max_seq_len), tokenizer, source.context)
        for path, n in texts
    )
    figures, base = [], 0.0
    for arm, rounding in ARMS.items():
        found = perplexity(quantized_model(source, ids, rounding), unseen)
        base = base or found
        figures.append(Figure(arm, "perplexity", "", [found], better="lower"))
        if rounding is not None:
            more = 100 * (found / base - 1)
            figures.append(Figure(arm, "more than not quantized", "%", [more], better="lower"))
    finish(make_result("calibration of int4, perplexity", settings, figures), out)


if __name__ == "__main__":
    run_benchmark(calibration, "calibration")
