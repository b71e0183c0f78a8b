"""All blocks as one operator, against the same modules run one by one."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llama.layers import kernels
from llama.layers.fused_layers import LOOKS, FusedLayers, Operator
from llama.layers.kernel_modules import KernelLinear
from llama.layers.lora import add_lora
from llama.layers.lora_config import LoRAConfig
from llama.layers.optimize import optimize, quantize_model
from llama.layers.quantized_linear import Int4Linear
from llama.layers.replace import replace_modules
from llama.model import KVCache, Layers, ModelArgs, Transformer

ROOM = 400  # positions of a cache
SCHEMES = pytest.mark.parametrize("scheme", [None, "int8", "int4", "int4 in groups"])


class Shape(NamedTuple):
    dim: int = 96
    heads: int = 6
    kv_heads: int = 2
    multiple_of: int = 32


# Widths that no vector divides, heads of 16 to 128, all ratios of query to key-value heads.
SHAPES = [
    Shape(),
    Shape(96, 6, 6),
    Shape(160, 2, 1),
    Shape(256, 2, 1, 96),
    Shape(288, 9, 3, 160),
    Shape(512, 4, 1, 64),
]


def build(shape: Shape, dtype: torch.dtype, scheme: Any = None) -> Transformer:
    args = ModelArgs(
        dim=shape.dim,
        n_layers=2,
        n_heads=shape.heads,
        n_kv_heads=shape.kv_heads,
        vocab_size=64,
        multiple_of=shape.multiple_of,
        max_seq_len=ROOM,
    )
    model = Transformer(args)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            spread = 0.2 if name.endswith("norm.weight") else weight.shape[-1] ** -0.5
            weight.normal_(1.0 if name.endswith("norm.weight") else 0.0, spread)
    model = model.to(dtype).eval()
    if scheme == "int4 in groups":  # of checkpoints that were stored so
        replace_modules(
            model.layers, {nn.Linear: lambda name, linear: Int4Linear(linear.weight.detach())}
        )
    else:
        quantize_model(model, scheme)
    optimize(model)
    return model


def filled(model: Transformer, rows: int) -> list[KVCache]:
    cache = model.new_cache(rows, ROOM)
    for layer in cache:
        layer.k.normal_()
        layer.v.normal_()
    return cache


class Case(NamedTuple):
    """B rows of T new positions at `starts`, from row `first_row` of a cache."""

    B: int
    T: int
    starts: Tensor | int
    first_row: int


def cases(seed: int, count: int, dtype: torch.dtype, longest: int) -> Iterator[Case]:
    draw = random.Random(seed)
    for i in range(count):
        T = 1 if dtype == torch.float32 else draw.choice([1, 1, 2, 3, 5, 16])
        B = draw.randint(1, 16 // T)
        starts: Tensor | int = draw.randint(0, longest - T)
        if i % 3:
            starts = torch.tensor([draw.randint(0, longest - T) for _ in range(B)])
        yield Case(B, T, starts, draw.randint(0, 2))


def run(model: Transformer, case: Case, cache: list[KVCache], h: Tensor, fused: bool) -> Tensor:
    B, T, starts, first_row = case
    length = None if isinstance(starts, int) else int(starts.max()) + T
    freqs_cis, mask, at = model.locate((B, T), starts, cache, length, first_row)
    layers = model.layers
    assert type(layers) is FusedLayers
    if fused:
        out: Tensor = layers(h, freqs_cis, mask, cache, at)
        assert layers._operator is not None and layers._operator.supports(h.dtype, cache)
        return out
    return Layers.forward(layers, h, freqs_cis, mask, cache, at)


def check(model: Transformer, case: Case, exact: bool) -> None:
    """The fused result and cache are those of the blocks one by one."""
    dtype = model.norm.weight.dtype
    h = torch.randn(case.B, case.T, model.params.dim).to(dtype)
    caches = [filled(model, case.B + 3)] * 2
    caches[1] = copy.deepcopy(caches[0])
    with torch.no_grad():
        got, want = (run(model, case, c, h, f) for c, f in zip(caches, (True, False), strict=True))
    pairs = [(got, want)]
    pairs += [(a.k, b.k) for a, b in zip(*caches, strict=True)]
    pairs += [(a.v, b.v) for a, b in zip(*caches, strict=True)]
    tolerance = 0.0 if exact else 2e-5 if dtype == torch.float32 else 0.04
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[1, 2, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@SCHEMES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equals_the_blocks(variant: str, dtype: torch.dtype, scheme: Any) -> None:
    """Bit for bit up to 64 positions in bf16; over more of them attention is divided otherwise."""
    for i, shape in enumerate(SHAPES):
        model = build(shape, dtype, scheme)
        for case in cases(i, 3, dtype, 64):
            check(model, case, exact=dtype == torch.bfloat16)
        for case in cases(i, 1, dtype, ROOM):
            check(model, case, exact=False)


@SCHEMES
def test_any_number_of_threads(ops: object, threads: int, scheme: Any) -> None:
    model = build(SHAPES[4], torch.bfloat16, scheme)
    for case in cases(7, 6, torch.bfloat16, 64):
        check(model, case, exact=True)


def test_a_row_is_the_same_beside_others(ops: object, threads: int) -> None:
    """Attention over a long context does not depend on the rows beside or the threads."""
    model = build(SHAPES[4], torch.float32)
    h, cache = torch.randn(8, 1, 288), filled(model, 8)
    starts = torch.tensor([5, 399, 128, 127, 0, 300, 64, 200])
    with torch.no_grad():
        several = run(model, Case(8, 1, starts, 0), copy.deepcopy(cache), h, True)
        for row in (1, 5):
            case = Case(2, 1, starts[row : row + 2], row)
            pair = run(model, case, copy.deepcopy(cache), h[row : row + 2], True)
            torch.testing.assert_close(pair, several[row : row + 2], rtol=0, atol=0)


def test_nan_stays_in_its_row(ops: object) -> None:
    for scheme in SCHEMES.args[1]:
        model = build(Shape(), torch.bfloat16, scheme)
        h, cache = torch.randn(3, 1, 96).bfloat16(), filled(model, 3)
        case = Case(3, 1, torch.tensor([1, 50, 200]), 0)
        with torch.no_grad():
            want = run(model, case, copy.deepcopy(cache), h, True)
            h[1, 0, 7] = float("nan")
            got = run(model, case, cache, h, True)
        assert got[1].isnan().all()
        torch.testing.assert_close(got[[0, 2]], want[[0, 2]], rtol=0, atol=0)


def test_weights_are_never_stale(ops: object) -> None:
    """Whatever replaces a weight, the next step computes with the new one."""
    model = build(Shape(), torch.bfloat16)
    case = Case(2, 1, 10, 0)
    check(model, case, exact=True)
    first: Any = model.layers[0]
    with torch.no_grad():
        first.attention.wq.weight.mul_(2)
    check(model, case, exact=True)
    first.feed_forward.w2.weight.data = torch.randn_like(first.feed_forward.w2.weight)
    check(model, case, exact=True)
    first.attention_norm.weight = nn.Parameter(torch.rand(96).bfloat16())
    check(model, case, exact=True)
    first.attention.wo = KernelLinear(96, 96, bias=False, dtype=torch.bfloat16)
    check(model, case, exact=True)
    state = {name: torch.randn_like(w) * 0.1 for name, w in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    check(model, case, exact=True)
    check(copy.deepcopy(model), case, exact=True)
    check(model.to(torch.float32), case, exact=False)
    model.layers[1] = model.layers[0]
    check(model, case, exact=False)


def test_what_it_does_not_know_runs_block_by_block(ops: object) -> None:
    model = build(Shape(), torch.bfloat16)
    h, cache = torch.randn(1, 1, 96).bfloat16(), filled(model, 1)
    freqs_cis, mask, at = model.locate((1, 1), 3, cache)

    def known() -> bool:
        model.layers(h, freqs_cis, mask, cache, at)
        operator = model.layers._operator
        return isinstance(operator, Operator) and operator.supports(torch.bfloat16, cache)

    with torch.no_grad():
        assert known()
        seen: list[Any] = []
        hook = model.layers[1].register_forward_hook(lambda *found: seen.append(found))
        assert not known() and len(seen) == 1
        hook.remove()
        assert known() and len(seen) == 1
        for part in ("attention", "attention.core", "feed_forward.w2", "ffn_norm"):
            hook = (
                model.layers[0]
                .get_submodule(part)
                .register_forward_hook(lambda *found: seen.append(found))
            )
            seen.clear()
            assert not known() and len(seen) == 1
            hook.remove()
        assert known()
        add_lora(model, LoRAConfig(targets=("wq",)))
        assert not known()
    model = build(Shape(), torch.bfloat16)
    model.layers(h, freqs_cis, mask, cache, at)
    assert model.layers._operator is None  # gradients need the blocks


def test_a_hook_that_is_being_made_is_seen(ops: object) -> None:
    """torch counts a hook before it is in its module's table; a step may come between the two."""
    model = build(Shape(), torch.bfloat16)
    h, cache = torch.randn(1, 1, 96).bfloat16(), filled(model, 1)
    place = model.locate((1, 1), 3, cache)
    seen: list[Any] = []
    with torch.no_grad():
        for _ in range(LOOKS + 1):
            model.layers(h, *place[:2], cache, place[2])
        RemovableHandle.next_id += 1
        for _ in range(2):
            model.layers(h, *place[:2], cache, place[2])
        hooks = model.layers[1]._forward_hooks
        hooks[RemovableHandle.next_id - 1] = lambda *found: seen.append(found)
        model.layers(h, *place[:2], cache, place[2])
        assert len(seen) == 1
        hooks.clear()
        model.layers(h, *place[:2], cache, place[2])
        operator = model.layers._operator
        assert isinstance(operator, Operator) and operator.supports(torch.bfloat16, cache)
        assert len(seen) == 1


def test_blocks_that_differ_run_one_by_one(ops: object) -> None:
    for name, value in [
        ("eps", 1.0),
        ("weight", nn.Parameter(torch.rand(96))),  # in fp32
    ]:
        model = build(Shape(), torch.bfloat16)
        setattr(model.layers[1].ffn_norm, name, value)
        setattr(model.layers[1].attention_norm, name, value)
        with torch.no_grad():
            operator = Operator(model.layers)
        assert not operator.supports(torch.bfloat16, filled(model, 1))


def test_errors_name_the_argument(ops: object) -> None:
    model = build(Shape(), torch.bfloat16)
    cache, h = filled(model, 2), torch.randn(2, 1, 96).bfloat16()
    freqs_cis, _, at = model.locate((2, 1), 3, cache)
    layers = Operator(model.layers)._layers
    assert at is not None
    good: dict[str, Any] = {
        "x": h,
        "keys": [c.k for c in cache],
        "values": [c.v for c in cache],
        "positions": at.positions,
        "turns": freqs_cis,
        "first_row": 0,
    }
    for name, bad, message in [
        ("x", h.float(), "x must be BFloat16"),
        ("x", h[..., :5], "x must be \\(B, T, 96\\)"),
        ("x", h.expand(2, 20, 96), "1 to 16 rows"),
        ("keys", good["keys"][:1], "for each of 2 blocks"),
        ("keys", [good["keys"][0], good["keys"][1][:, :9]], "same shape and strides"),
        ("values", [c.v.float() for c in cache], "a cache must be"),
        ("values", [c.v[:, :9] for c in cache], "same shape"),
        ("positions", at.positions.int(), "positions must be int64"),
        ("positions", at.positions + ROOM, "outside the 400"),
        ("positions", at.positions - 4, "outside the 400"),
        ("turns", freqs_cis[..., :3], "turns must be"),
        ("first_row", 1, "outside a cache of 2"),
        ("first_row", -1, "outside a cache of 2"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            layers.forward(**{**good, name: bad})
    layers.forward(**good)
    assert kernels.supports(h)


CODE = """
import os, torch
from tests.layers.test_fused_layers import SHAPES, Case, build, check
model = build(SHAPES[4], torch.bfloat16)
torch.set_num_threads(4)
check(model, Case(3, 2, 9, 0), exact=True)
if (pid := os.fork()) == 0:  # without the threads of its parent
    torch.set_num_threads(1)
    check(model, Case(3, 2, 9, 0), exact=True)
    print("child", flush=True)
    os._exit(0)
os.waitpid(pid, 0)
print("parent")
"""


@pytest.mark.slow
@pytest.mark.parametrize("limits", [{}, {"OMP_THREAD_LIMIT": "1"}, {"OMP_DYNAMIC": "true"}])
def test_fewer_threads_than_asked_for_and_a_fork(ops: object, limits: dict[str, str]) -> None:
    environment = {**os.environ, **limits, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["child", "parent"], done.stderr
