"""Norm, rotation and gate by CPU kernels, against the model's own operators."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llama.layers.kernel_modules import KernelLinear, KernelRMSNorm, linears, rotate, swiglu
from llama.layers.optimize import optimize
from llama.layers.replace import as_class
from llama.model import ModelArgs, RMSNorm, Transformer, apply_rotary_emb

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
def test_norm_rotation_and_gate(variant: str, dtype: torch.dtype) -> None:
    """In bf16 they are bit-identical: results are rounded at the same points as by torch."""
    bounds = {"rtol": 0, "atol": 0} if dtype == torch.bfloat16 else {"rtol": 2e-6, "atol": 2e-6}
    ops = torch.ops.llama3
    for B, T, heads, D in [(1, 1, 9, 64), (3, 1, 2, 20), (2, 7, 3, 2), (1, 200, 4, 128)]:
        x, gate = torch.randn(2, B, T, heads * D).to(dtype) * 5
        weight = torch.randn(heads * D).to(dtype)
        want = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, True) + 1e-5)).to(dtype) * weight
        torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), want, **bounds)
        torch.testing.assert_close(ops.swiglu(gate, x), F.silu(gate) * x, **bounds)
        x = x.view(B, T, heads, D)
        for shape in ((T, D // 2), (B, T, D // 2)):
            turns = torch.polar(torch.ones(shape), torch.rand(shape) * 9)
            want = apply_rotary_emb(x, x, turns)[0]
            got = ops.rotary(x, turns)  # fused multiply-add rounds once
            torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=2e-6)
            assert dtype == torch.float32 or (got != want).float().mean() < 1e-3
    inf, nan = float("inf"), float("nan")
    a = torch.tensor([-inf, -1e38, -200.0, -88, 0, 88, 200, inf, nan], dtype=dtype)
    got = ops.swiglu(a, torch.ones_like(a))
    torch.testing.assert_close(got, F.silu(a), rtol=2e-6, atol=1e-30, equal_nan=True)


def test_errors_name_the_argument(ops: object) -> None:
    x, turns = torch.randn(2, 3, 4, 8), torch.randn(3, 4, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="weight \\(D,\\)"):
        torch.ops.llama3.rms_norm(x, torch.ones(7), 1e-5)
    with pytest.raises(RuntimeError, match="both must be Float"):
        torch.ops.llama3.rms_norm(x, torch.ones(8).bfloat16(), 1e-5)
    with pytest.raises(RuntimeError, match="must have the same shape"):
        torch.ops.llama3.swiglu(x, x[:1])
    with pytest.raises(RuntimeError, match="fp32 or bf16"):
        torch.ops.llama3.swiglu(x.double(), x.double())
    for bad in (turns[:2], turns[:, :3], turns.expand(3, 3, 4)):
        with pytest.raises(RuntimeError, match="x must be"):
            torch.ops.llama3.rotary(x, bad)
    with pytest.raises(RuntimeError, match="complex64"):
        torch.ops.llama3.rotary(x, turns.real)


def test_optimized_model_equals_the_plain_one(ops: object) -> None:
    """The same logits with and without a cache, the same gradients and state-dict names."""
    args = ModelArgs(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=300, max_seq_len=32)
    model, tokens = Transformer(args), torch.randint(0, 300, (2, 12))
    want, names = model(tokens), list(model.state_dict())
    want.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    optimize(model)
    assert isinstance(model.norm, KernelRMSNorm) and list(model.state_dict()) == names
    model(tokens).sum().backward()
    for p, grad in zip(model.parameters(), gradients, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, grad)
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), want, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(tokens[:, :11], 0), want[:, :11], atol=1e-5, rtol=0)
        torch.testing.assert_close(model(tokens[:, 11:], 11), want[:, 11:], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_projections_are_one_call(ops: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several `KernelLinear` are one call, with the result of separate calls."""
    modules = [as_class(nn.Linear(64, n, bias=False), KernelLinear) for n in (48, 16, 16)]
    plain = nn.Linear(64, 8, bias=False)
    calls: list[int] = []
    together = torch.ops.llama3.linears

    def spy(x: torch.Tensor, ws: list[torch.Tensor]) -> list[torch.Tensor]:
        calls.append(len(ws))
        found: list[torch.Tensor] = together(x, ws)
        return found

    monkeypatch.setattr(torch.ops.llama3, "linears", spy)
    for rows, some in ((1, modules), (1, [*modules, plain]), (300, modules)):
        x = torch.randn(rows, 64)
        for found, linear in zip(linears(x, *some), some, strict=True):
            weight = linear.weight
            assert isinstance(weight, torch.Tensor)
            torch.testing.assert_close(found, x @ weight.T, atol=1e-5, rtol=0)
    assert calls == [3]


def test_compiled_and_fake(ops: object) -> None:
    norm, turns = KernelRMSNorm(64), torch.polar(torch.ones(2, 16), torch.rand(2, 16))

    def step(x: torch.Tensor) -> torch.Tensor:
        x = norm(x).view(1, 2, 2, 32)
        xq, xk = rotate(x, x, turns)
        return swiglu(xq, xk)

    x = torch.randn(1, 2, 64)
    with torch.inference_mode():
        compiled = torch.compile(step, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), step(x))
        plain = RMSNorm(64)(x).view(1, 2, 2, 32)
        turned = apply_rotary_emb(plain, plain, turns)[0]
        torch.testing.assert_close(step(x), F.silu(turned) * turned)
    with FakeTensorMode():
        y = torch.ops.llama3.rms_norm(torch.empty(3, 8), torch.empty(8), 1e-5)
        assert torch.ops.llama3.swiglu(y, y).shape == (3, 8)
