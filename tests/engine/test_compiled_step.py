"""A compiled decoding step equals the plain one and compiles for a few shapes only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llama import Llama, ModelArgs, Transformer
from llama.engine.compiled_step import CompiledStep, Graph
from llama.layers.kernel_modules import rotate
from llama.layers.optimize import optimize
from llama.model import TransformerBlock, apply_rotary_emb, precompute_freqs_cis

SCRIPT = Path(__file__).parent / "compiled_decoding.py"


def run(*arguments: object, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("quantize", [None, pytest.param("int4", marks=pytest.mark.slow)])
def test_compiled_agrees(
    quantize: str | None,
    tiny_checkpoint: Callable[..., Path],
    byte_tokenizer_path: Path,
) -> None:
    folder = tiny_checkpoint(n_layers=3, multiple_of=32, vocab_size=512)
    found = run(folder, byte_tokenizer_path, *([quantize] if quantize else []))
    assert found["compiled"] and found["warnings"] == []
    assert found["same_ids"] and found["difference"] < 1e-4
    assert found["left_in_cache"] == 0.0
    # Not one per layer or length, but one for one row, several rows, and all rows of the cache.
    assert 2 <= found["graphs"] <= 4 and found["graphs_later"] == 0
    assert found["freed"] == [True, True]  # without the garbage collector


def test_without_a_compiler_it_warns_and_runs_eagerly(
    tiny_checkpoint: Callable[..., Path], byte_tokenizer_path: Path, tmp_path: Path
) -> None:
    found = run(
        tiny_checkpoint(vocab_size=512),
        byte_tokenizer_path,
        CXX="no-such-compiler",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path),
        LLAMA3_KERNELS="0",
    )
    assert not found["compiled"] and len(found["warnings"]) == 1
    assert "no-such-compiler" in found["warnings"][0] or "compiler" in found["warnings"][0]
    assert found["warnings"][0].endswith("it needs a C++ compiler: install g++ or set CXX")
    assert found["same_ids"] and found["difference"] == 0.0 and found["left_in_cache"] == 0.0


def test_a_folder_that_is_not_writable(
    tiny_checkpoint: Callable[..., Path], byte_tokenizer_path: Path, tmp_path: Path
) -> None:
    """By the command, which sets torch's folder to one in LLAMA3_CACHE. No compiler: it is fast."""
    (tmp_path / "file").touch()
    environment = {"PYTHONPATH": str(SCRIPT.parents[2]), "TMPDIR": str(tmp_path)}
    environment |= {"LLAMA3_CACHE": str(tmp_path / "file" / "below"), "LLAMA3_KERNELS": "0"}
    environment["CXX"] = "no-such-compiler"
    command = [sys.executable, "-m", "llama", "complete", "a", "--compile"]
    folder = tiny_checkpoint(vocab_size=512)
    command += [f"--ckpt_dir={folder}", f"--tokenizer_path={byte_tokenizer_path}"]
    done = subprocess.run(
        [*command, "--max_gen_len=2"],
        env={k: v for k, v in os.environ.items() if "CACHE" not in k} | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("set TORCHINDUCTOR_CACHE_DIR to a folder of your own") == 1
    assert "decoding is not compiled: " in done.stderr


def test_exact_and_compile_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose one"):
        Llama.build(tmp_path, None, 32, 1, exact=True, compile=True)


@pytest.mark.parametrize("name", ["exact", "compile"])
@pytest.mark.parametrize("value", ["False", "no", 1, None])
def test_exact_and_compile_are_true_or_false(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=f"{name} must be True or False, not {value!r}"):
        Llama.build(tmp_path, None, 32, 1, **{name: value})


def test_real_rotation_is_the_complex_one() -> None:
    xq, xk = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 2, 16)
    freqs_cis = precompute_freqs_cis(16, 32)
    for some in (freqs_cis[5:8], freqs_cis[torch.tensor([[0, 1, 2], [9, 10, 11]])]):
        expected = apply_rotary_emb(xq, xk, some)
        for found, wanted in zip(rotate(xq, xk, torch.view_as_real(some)), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_a_graph_gets_the_inputs_of_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake of CUDA's graphs: capturing one needs a GPU."""

    def step(tokens: Tensor, start_pos: Tensor) -> Tensor:
        return 100 * tokens + start_pos.unsqueeze(1)

    class Replaying:
        def replay(self) -> None:
            graph.out.copy_(step(*graph.inputs))

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replaying)
    for name in ("graph", "stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda of, **options: nullcontext())
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: stream)
    tokens = torch.tensor([[1], [2]])
    graph = Graph(step, (tokens, torch.tensor([3, 4])), None)
    tokens.zero_()  # the graph has copies of the caller's tensors
    assert graph(torch.tensor([[1], [2]]), torch.tensor([3, 4])).tolist() == [[103], [204]]
    assert graph(torch.tensor([[5], [6]]), torch.tensor([7, 8])).tolist() == [[507], [608]]


def optimized_model() -> Transformer:
    model = Transformer(ModelArgs(dim=32, n_layers=1, n_heads=4, vocab_size=50, max_seq_len=600))
    optimize(model)
    return model


def test_a_graph_for_each_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    model = optimized_model()
    cache = model.new_cache(2, 600)
    captured: list[Callable[[Tensor, Tensor], Tensor]] = []

    def graph(run: Callable[[Tensor, Tensor], Tensor], *inputs: object) -> object:
        captured.append(run)
        return run

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr("llama.engine.compiled_step.Graph", graph)
    step = CompiledStep(model, cache)
    step.graphed, step.block = True, TransformerBlock.forward
    for rows, length in ((1, 3), (1, 256), (2, 4), (2, 257), (2, 600), (1, 200)):
        start_pos = torch.full((rows,), length - 1)
        tokens = torch.ones(rows, 1, dtype=torch.long)
        found = step(tokens, start_pos, length)
        with torch.inference_mode():
            torch.testing.assert_close(found, model.hidden(tokens, start_pos, cache, length))
    assert set(step.graphs) == {(1, 256), (2, 256), (2, 512), (2, 600)} and len(captured) == 4


def test_a_graph_that_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = optimized_model()
    cache = model.new_cache(2, 600)
    tries = []

    def graph(*inputs: object) -> None:
        tries.append(inputs)
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr("llama.engine.compiled_step.Graph", graph)
    step = CompiledStep(model, cache)
    step.graphed, step.block = True, TransformerBlock.forward
    tokens, start_pos = torch.tensor([[7]]), torch.tensor([0])
    with torch.inference_mode():
        expected = model.hidden(tokens, start_pos, cache, 256)
    with pytest.warns(UserWarning, match="without CUDA graphs: no memory left"):
        torch.testing.assert_close(step(tokens, start_pos, 1), expected)
    torch.testing.assert_close(step(tokens, start_pos, 1), expected)
    assert len(tries) == 1
