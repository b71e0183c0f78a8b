"""The caller's default dtype changes no result: not of a build, a draw, a rotation, a training."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llama import Llama, ModelArgs, Transformer
from llama.checkpoints.open import open_checkpoint
from llama.train.pretraining import train
from tests.checkpoints.gguf_files import DIM, HEADS, weights, write_gguf
from tests.checkpoints.test_gguf import llama31_divisors
from tests.train.training import SMALL, losses, write_text

PACKAGE = Path(__file__).parent.parent / "llama"
# Functions of torch whose result has the default dtype unless they are given one.
FACTORIES = {"empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros"}
DEFAULTS = (torch.float32, torch.float64, torch.bfloat16)


@pytest.fixture(autouse=True)
def default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def in_each_default(compute: Callable[[], Any]) -> list[Any]:
    results = []
    for dtype in DEFAULTS:
        torch.set_default_dtype(dtype)
        torch.manual_seed(3)
        results.append(compute())
    return results


@pytest.mark.parametrize(
    "more", [{}, {"exact": True}, {"quantize": "int8"}, {"dtype": "bf16"}], ids=str
)
def test_ids_logprobs_and_draws(
    tiny_checkpoint: Callable[..., Path], byte_tokenizer_path: Path, more: dict[str, Any]
) -> None:
    folder = tiny_checkpoint(vocab_size=512, use_scaled_rope=True)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]

    def generate() -> Any:
        options = {"device": "cpu", "dtype": "fp32"} | more
        llama = Llama.build(folder, byte_tokenizer_path, 64, 2, **options)
        return [
            llama.generate(prompts, 8, temperature=0.0, logprobs=True, echo=True),
            llama.generate(prompts, 8, temperature=1.0, seed=[5, 6], logprobs=True),
            llama.generate(prompts[:1], 8, temperature=1.0, top_k=50, min_p=0.001),
            llama.perplexity("a text to score, in windows", stride=8).perplexity,
            str(llama.model.freqs_cis.dtype),
            llama.model.freqs_cis.tolist(),
        ]

    want, *others = in_each_default(generate)
    for found in others:
        assert found == want


def test_new_models_and_whole_sequences() -> None:
    """Initial weights, too: they are fp32, and their seeded draws are the same."""
    args = ModelArgs(dim=32, n_layers=2, n_heads=4, vocab_size=60, max_seq_len=16)

    def logits() -> torch.Tensor:
        model = Transformer(args)
        assert {w.dtype for w in model.parameters()} == {torch.float32}
        out: torch.Tensor = model(torch.arange(8).view(1, 8))
        return out.detach()

    want, *others = in_each_default(logits)
    for found in others:
        assert found.dtype == torch.float32 and torch.equal(found, want)


def test_rope_scaling_of_gguf(tmp_path: Path) -> None:
    divisors = {"rope_freqs.weight": llama31_divisors(8.0, DIM // HEADS)}
    path = write_gguf(tmp_path / "m.gguf", weights() | divisors)
    assert isinstance(divisors["rope_freqs.weight"], np.ndarray)
    factors = in_each_default(lambda: open_checkpoint(path).params["rope_scale_factor"])
    assert factors == [8.0] * len(DEFAULTS)


def test_training(tmp_path: Path) -> None:
    """Initial weights, optimizer and samples: every loss is the same, digit by digit."""
    text = write_text(tmp_path / "text.txt")

    def run() -> Any:
        out = tmp_path / str(torch.get_default_dtype())
        train(text, out, SMALL, device="cpu")
        return losses(out)

    want, *others = in_each_default(run)
    for found in others:
        assert found == want


def test_every_tensor_is_made_with_a_dtype() -> None:
    """Ids are made from integers (`torch.tensor`, `torch.arange`), which are int64 in any case."""
    without = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch."):
                named = {keyword.arg for keyword in node.keywords}
                if ast.unparse(node.func)[6:] in FACTORIES and "dtype" not in named:
                    without.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert without == []
