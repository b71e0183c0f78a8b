"""Modules for NVIDIA's GPUs, as far as a CPU can tell: what they compute, and on fake CUDA tensors.

tests/cuda runs them on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llama.engine.sampling import sample_rows
from llama.layers import cuda_ops, gpu_modules
from llama.layers.attention import FlashAttention, folded_attention
from llama.layers.gpu_modules import (
    FusedRMSNorm,
    TinygemmLinear,
    TritonLinear,
)
from llama.layers.joined import JoinedFeedForward, JoinedHeads, join
from llama.layers.optimize import JOINED, optimize
from llama.layers.quantized_linear import Int4Linear, Int8Linear, quantized
from llama.layers.replace import factory_of, replace_modules
from llama.model import ModelArgs, RMSNorm, Transformer, causal_mask
from tests.models import random_weights

SHAPE: dict[str, Any] = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
SHAPE |= {"vocab_size": 100, "multiple_of": 32}


def make_model() -> Transformer:
    model = Transformer(ModelArgs(**SHAPE, max_seq_len=64, max_batch_size=3))
    model.load_state_dict(random_weights(**SHAPE))
    return model.requires_grad_(False)


@pytest.mark.parametrize("scheme", [None, "int8", "int4"])
def test_joined_linears(scheme: str | None) -> None:
    """One matmul for neighbouring linears gives what they give one by one."""
    model, tokens = make_model(), torch.arange(14).view(2, 7)
    if scheme is not None:
        replace_modules(model, {nn.Linear: quantized(scheme)})
    expected = model(tokens)
    size = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    replace_modules(model, JOINED)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(JoinedHeads) == kinds.count(JoinedFeedForward) == 2
    linears = [module for module in model.modules() if "Linear" in type(module).__name__]
    assert len(linears) == 4 * 2 + 1  # of 7 a layer, and the output
    assert sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) == size
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)


def test_linears_that_cannot_be_joined() -> None:
    """Rows of int4 that do not fill tiles; linears of two kinds."""
    tiles = [Int4Linear(torch.randn(n, 64)) for n in (24, 16)]
    assert join(*tiles) is None
    assert join(*reversed(tiles)) is not None
    assert join(nn.Linear(4, 4, bias=False), Int8Linear(torch.randn(4, 4))) is None


def test_norm() -> None:
    """One rounding instead of two, in bf16."""
    norm, x = RMSNorm(64, 1e-5), torch.randn(3, 64)
    norm.weight.data = torch.rand(64)
    fused = factory_of(FusedRMSNorm)("norm", norm)
    torch.testing.assert_close(fused(x), norm(x))
    half = fused.to(torch.bfloat16)(x.bfloat16()).float()
    torch.testing.assert_close(half, norm.float()(x), rtol=2e-2, atol=2e-2)


def test_every_tensor_is_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill, decoding and drawing on fake CUDA tensors: a CPU tensor among them would raise."""
    for name in ("is_ampere", "triton_works", "flash_works"):
        monkeypatch.setattr(f"llama.layers.optimize.{name}", lambda *of: True)
    plain = make_model()
    shapes = {name: w.shape for name, w in plain.state_dict().items()}
    with FakeTensorMode(allow_non_fake_inputs=False), torch.inference_mode():
        with torch.device("meta"):
            model = Transformer(plain.params)
        weights = {
            n: torch.empty(s, dtype=torch.bfloat16, device="cuda") for n, s in shapes.items()
        }
        model.load_state_dict(weights, assign=True)
        optimize(model)
        kinds = {type(module) for module in model.modules()}
        wanted = {FlashAttention, FusedRMSNorm, JoinedHeads, JoinedFeedForward}
        assert wanted | {TritonLinear} <= kinds
        cache = model.new_cache(3, 64)
        for rows, T, start in ((3, 5, 0), (3, 5, None), (1, 1, None), (2, 1, None)):
            tokens = torch.ones(rows, T, dtype=torch.long, device="cuda")
            at = torch.ones(rows, dtype=torch.long, device="cuda") if start is None else start
            h = model.hidden(tokens, at, cache, 64)
            assert h.shape == (rows, T, 128) and h.device.type == "cuda"
        logits = model.logits(h).squeeze(1)
        settings = [torch.empty(2, device="cuda", dtype=torch.float32) for _ in range(4)]
        ids = sample_rows(logits, settings, settings[0], True)
    assert ids.shape == (2,) and ids.device.type == "cuda" and ids.dtype == torch.int64


def test_tinygemm_dequantizes_for_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Int4Linear(torch.randn(40, 128))
    weight = torch.randn(40, 128).bfloat16()
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda pairs, inner: pairs)
    monkeypatch.setattr(TinygemmLinear, "dequantized", lambda self: weight)
    kernel = TinygemmLinear(linear)
    for rows in (gpu_modules.INT4_ROWS + 1, 200):
        x = torch.randn(rows, 128).bfloat16()
        torch.testing.assert_close(kernel(x), x @ weight.T)


def test_what_does_not_work_here_is_not_used() -> None:
    """Torch's flash kernel and Triton's need a GPU: no error, and the plain path stays."""
    cuda_ops.load()
    cpu = torch.device("cpu")
    assert not gpu_modules.is_ampere(cpu)
    assert not gpu_modules.flash_works(cpu, torch.bfloat16, 32)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, begin_q: Tensor, begin_k: Tensor, *more: Any, seqused_k: Tensor
) -> tuple[Tensor]:
    """What torch's flash kernel computes for rows of different lengths, row by row in fp32.

    Row b has the queries from begin_q[b] to begin_q[b + 1], and the seqused_k[b] keys from
    begin_k[b] on. If causal, its last query sees all of these keys.
    """
    out, group, causal = torch.empty_like(q), q.shape[1] // k.shape[1], more[3]
    for b, n in enumerate(seqused_k.tolist()):
        rows = slice(int(begin_q[b]), int(begin_q[b + 1]))
        keys, values = (
            t[int(begin_k[b]) : int(begin_k[b]) + n].float().repeat_interleave(group, 1)
            for t in (k, v)
        )
        queries = q[rows].float()
        scores = torch.einsum("thd,shd->hts", queries, keys) / math.sqrt(q.shape[2])
        if causal:
            T = len(queries)
            hidden = torch.ones(T, n, dtype=torch.bool).tril(n - T).logical_not()
            scores = scores.masked_fill(hidden, -math.inf)
        out[rows] = torch.einsum("hts,shd->thd", scores.softmax(-1), values).to(q.dtype)
    return (out,)


def test_arguments_of_the_flash_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged rows, a first row that is not 0, prompts after a cache."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", varlen_attention, raising=False)
    args = ModelArgs(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=9, max_seq_len=40)
    model = Transformer(args)
    cases: list[tuple[int, int, int | Tensor, int]] = [
        (3, 5, torch.tensor([0, 7, 20]), 1),
        (2, 1, torch.tensor([3, 30]), 0),
        (2, 6, 4, 3),
        (1, 1, 0, 2),
    ]
    for B, T, start, first in cases:
        cache = model.new_cache(5, 40)
        cache[0].k.normal_()
        cache[0].v.normal_()
        _, _, at = model.locate((B, T), start, cache, first_row=first)
        assert at is not None
        keys, values = (
            t.narrow(0, first, B).narrow(1, 0, at.length) for t in (cache[0].k, cache[0].v)
        )
        mask = causal_mask(at.positions.expand(B, T), at.length)
        xq = torch.randn(B, T, 4, 16)
        found = cuda_ops.flash_attend(xq, keys, values, at.queries, at.keys, at.ends)
        torch.testing.assert_close(found, folded_attention(xq, keys, values, mask))
    for head_dim in (16, 128):  # the probe, which decides on a GPU, accepts a right kernel
        works = gpu_modules.flash_works.__wrapped__
        cuda_ops.load()
        assert works(torch.device("cpu"), torch.bfloat16, head_dim)
