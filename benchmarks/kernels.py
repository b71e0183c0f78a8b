"""How fast the CPU kernels are, beside torch's own operators and reading alone.

    python -m benchmarks.kernels linear
    python -m benchmarks.kernels linear --rows 2,4,8,128 --shapes 8192x2048 --threads 1
    python -m benchmarks.kernels attention --heads 32 --kv_heads 8 --head_dim 64

`linear` prints GB/s of weights (with scales), and for several rows of x GFLOP/s in brackets; x
bf16, the weights cold: enough copies of each matrix to fill no cache. All of one line are timed in
alternation, because machines drift; each figure is the fastest tenth of its calls. "read" sums a
tensor of 1 GiB in the same rounds. `attention` prints milliseconds of one layer in bf16, and GB/s
of its cache, cold too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.flags import check_counts
from llama.attention import fused_grouped_attention
from llama.commands.script import run_script
from llama.layers import kernels
from llama.layers.quantization import dequantize_int8

SHAPES = "576x576,1536x576,576x1536,49152x576,2048x2048,8192x2048,2048x8192,128256x2048"
COLD_BYTES = 128 << 20  # more than the last cache holds
Calls = dict[str, tuple[list[Callable[[], Tensor]], int]]  # name: functions, bytes of weights
Contender = tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]  # operator, new weights


def int4_weights(N: int, K: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes and scales, packed as `quantize_int4` does."""
    tiles = -(-N // 16)
    packed = torch.randint(-(2**31), 2**31, (tiles, K // 8, 16), dtype=torch.int64)
    scale, zero = torch.rand(2, tiles, K // group, 16).bfloat16()
    return packed.to(torch.int32), scale, zero


def torch_int4_weights(N: int, K: int, group: int) -> tuple[Tensor, Tensor]:
    """The same for torch's operator: its packing, scales and zeros (K / group, N, 2)."""
    codes = torch.randint(0, 16, (N, K), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed, torch.rand(K // group, N, 2).bfloat16()


def contenders(x: Tensor, N: int, K: int, group: int = 32) -> dict[str, Contender]:
    """Ours and torch's. A new set of weights a call; scales of int8 are too few to count."""
    ops, scale = torch.ops.llama3, torch.rand(N)
    half = scale.bfloat16()
    torch_int4 = torch.ops.aten._weight_int4pack_mm_for_cpu

    def bf16() -> tuple[Tensor]:
        return (torch.empty(N, K, dtype=torch.bfloat16).normal_(),)

    def int8() -> tuple[Tensor]:
        return (torch.randint(-127, 128, (N, K), dtype=torch.int8),)

    found: dict[str, Contender] = {
        "bf16": (lambda w: ops.linear(x, w), bf16),
        "F.linear": (lambda w: F.linear(x, w), bf16),
        "int8": (lambda q: ops.linear_int8(x, q, scale), int8),
        "int8pack": (lambda q: torch._weight_int8pack_mm(x, q, half), int8),
        "dequant8": (lambda q: F.linear(x, dequantize_int8(q, scale).bfloat16()), int8),
        "int4": (lambda *w: ops.linear_int4(x, *w, N), lambda: int4_weights(N, K, group)),
        "int4pack": (
            lambda w, s: torch_int4(x, w, group, s),
            lambda: torch_int4_weights(N, K, group),
        ),
    }
    if len(x) == 1:
        found["torch.mv"] = (lambda w: torch.mv(w, x[0]), bf16)
    if N % 64:  # torch packs int4 in blocks of rows
        del found["int4pack"]
    return found


def measure(
    calls: dict[str, tuple[list[Callable[[], Tensor]], int]], seconds: float
) -> Iterator[tuple[str, float]]:
    """(name, GB/s) of each, from the bytes of a call: rounds of all, for about `seconds` each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end, rounds = time.perf_counter() + seconds * len(calls), 0
    while rounds < 3 or time.perf_counter() < end:
        rounds += 1
        for name, (functions, _) in calls.items():
            for function in functions:
                start = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - start)
    for name, (_, size) in calls.items():
        yield name, size / sorted(times[name])[len(times[name]) // 10] / 1e9


def counts(flag: str, text: str, example: str) -> list[tuple[int, ...]]:
    """Of `linear`'s or `attention`'s flag: "8x16,8x32" -> [(8, 16), (8, 32)].

    Raises:
        ValueError: it is not like the example.
    """
    dimensions = len(example.split(",")[0].split("x"))
    parts = [part.split("x") for part in str(text).split(",")]
    if not all(len(part) == dimensions and all(map(is_count, part)) for part in parts):
        raise ValueError(f"--{flag} must be counts such as {example}, not {text!r}")
    return [tuple(map(int, part)) for part in parts]


def is_count(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def begin(threads: int | None) -> None:
    """Load the kernels, and say what they run on."""
    if threads is not None:
        check_counts(threads=threads)
        torch.set_num_threads(threads)
    if not kernels.load():
        raise SystemExit("the kernels cannot be compiled here")
    print(f"{torch.get_num_threads()} threads, {torch.ops.llama3.variants()[0]}")


def linear(
    rows: str = "1",
    shapes: str = SHAPES,
    only: str = "",
    threads: int | None = None,
    seconds: float = 0.5,
) -> None:
    """Print the table.

    Args:
        rows: of x, separated by commas.
        shapes: NxK, separated by commas.
        only: names of columns; all if empty.
    """
    Ms, sizes = counts("rows", rows, "2,4,8"), counts("shapes", shapes, "8192x2048,2048x2048")
    begin(threads)
    big = torch.arange(1 << 27)
    for [M] in Ms:
        for N, K in sizes:
            x = torch.randn(M, K).bfloat16()
            calls: Calls = {"read": ([big.sum], big.nbytes)}
            for name, (operator, new) in contenders(x, N, K).items():
                if only and name not in only.split(","):
                    continue
                size = sum(t.nbytes for t in new())
                sets = [new() for _ in range(min(200, max(1, COLD_BYTES // size)))]
                functions: list[Callable[[], Tensor]] = [
                    partial(operator, *weights) for weights in sets
                ]
                calls[name] = (functions, size)
            cells = []
            for name, speed in measure(calls, seconds):
                cell = f"{name} {speed:5.1f}"
                if M > 1 and name != "read":
                    cell += f" ({speed / calls[name][1] * 2 * M * N * K:.0f})"
                cells.append(cell)
            print(f"{f'{N}x{K}':>12} x {M:<3} " + "  ".join(cells), flush=True)


def attention(
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 64,
    shapes: str = "1x128,1x1024,1x4096,128x128,512x512",
    threads: int | None = None,
    seconds: float = 1.0,
) -> None:
    """Print a line for each shape, queries x positions, the queries being the last positions."""
    check_counts(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    sizes = counts("shapes", shapes, "1x128,128x128")
    begin(threads)
    ops = torch.ops.llama3
    for T, S in sizes:
        positions = torch.arange(S - T, S).unsqueeze(0)
        mask = None if T in (1, S) else torch.arange(S) <= positions[0].unsqueeze(1)
        xq = torch.randn(1, T, heads, head_dim).bfloat16()
        size = 4 * S * kv_heads * head_dim
        caches = [
            torch.randn(2, 1, S, kv_heads, head_dim).bfloat16()
            for _ in range(min(200, max(1, COLD_BYTES // size)))
        ]
        calls: Calls = {
            "kernel": ([partial(ops.attend, xq, *cache, positions) for cache in caches], size),
            "torch": (
                [partial(fused_grouped_attention, xq, *cache, mask) for cache in caches],
                size,
            ),
        }
        cells = [
            f"{name} {size / v / 1e6:8.3f} ms {v:5.1f} GB/s" for name, v in measure(calls, seconds)
        ]
        print(f"{f'{T}x{S}':>12}  " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    verbs = {"linear": linear, "attention": attention}
    run_script(verbs, "benchmarks.kernels")
