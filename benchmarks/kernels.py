"""Speed of the CPU kernels beside torch's operators and the bandwidth of reading memory.

    python -m benchmarks.kernels linear
    python -m benchmarks.kernels linear --rows 2,4,8,128 --shapes 8192x2048 --threads 1
    python -m benchmarks.kernels linear --only bf16,int8 --variant avx512bf16
    python -m benchmarks.kernels attention --heads 32 --kv_heads 8 --head_dim 64

`linear` prints GB/s of weights with their scales, and for several rows of x GFLOP/s in brackets. x
is bf16; variants that end in -vnni convert it to 8 bits for int8. There are so many copies of each
matrix that none stays in a cache. Everything on a line is timed alternately; each figure is the
10th percentile of the calls' times. "read" sums a tensor of 1 GiB in the same rounds. `attention`
prints milliseconds of one layer in bf16, and GB/s of its KV cache, which is not in the processor's
cache either. Both print one JSON line, which --out saves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.flags import check_counts, check_file
from benchmarks.report import Figure, finish, make_result
from benchmarks.script import run_benchmark
from llama.layers import kernels
from llama.layers.attention import fused_attention
from llama.layers.quantization import dequantize_int8

SHAPES = "576x576,1536x576,576x1536,49152x576,2048x2048,8192x2048,2048x8192,128256x2048"
COLD_BYTES = 128 << 20  # larger than the last-level cache
Calls = dict[str, tuple[list[Callable[[], Tensor]], int]]  # name: functions, bytes of weights
Contender = tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]  # operator, new weights


def int4_weights(N: int, K: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes and scales, packed as `quantize_int4` packs them."""
    tiles = -(-N // 16)
    packed = torch.randint(-(2**31), 2**31, (tiles, K // 8, 16), dtype=torch.int64)
    scale, zero = torch.rand(2, tiles, K // group, 16).bfloat16()
    return packed.to(torch.int32), scale, zero


def torch_int4_weights(N: int, K: int, group: int) -> tuple[Tensor, Tensor]:
    """The same for torch's operator: packed codes, and (K / group, N, 2) scales and zeros."""
    codes = torch.randint(0, 16, (N, K), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed, torch.rand(K // group, N, 2).bfloat16()


def contenders(x: Tensor, N: int, K: int, group: int = 32) -> dict[str, Contender]:
    """This library's operators and torch's. The bytes of int8 scales are not counted."""
    ops, scale = torch.ops.llama3, torch.rand(N)
    half = scale.bfloat16()
    torch_int4 = torch.ops.aten._weight_int4pack_mm_for_cpu

    def bf16() -> tuple[Tensor]:
        return (torch.empty(N, K, dtype=torch.bfloat16).normal_(),)

    def int8() -> tuple[Tensor]:
        return (torch.randint(-127, 128, (N, K), dtype=torch.int8),)

    operators: dict[str, Contender] = {
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
        operators["torch.mv"] = (lambda w: torch.mv(w, x[0]), bf16)
    if N % 64:  # torch packs int4 in blocks of rows
        del operators["int4pack"]
    return operators


def measure(
    calls: dict[str, tuple[list[Callable[[], Tensor]], int]], seconds: float
) -> Iterator[tuple[str, float]]:
    """Yield (name, GB/s) of each; rounds of all of them alternate for about `seconds` each."""
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
    """Parse a flag: "8x16,8x32" -> [(8, 16), (8, 32)].

    Raises:
        ValueError: it has not the form of the example.
    """
    dimensions = len(example.split(",")[0].split("x"))
    parts = [part.split("x") for part in str(text).split(",")]
    if not all(len(part) == dimensions and all(map(is_count, part)) for part in parts):
        raise ValueError(f"--{flag} must be counts such as {example}, not {text!r}")
    return [tuple(map(int, part)) for part in parts]


def is_count(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


def begin(threads: int | None, out: str | None, variant: str = "") -> None:
    """Check flags, load the kernels, print threads and instruction set."""
    check_file("out", out, ".json")
    if threads is not None:
        check_counts(threads=threads)
        torch.set_num_threads(threads)
    if not kernels.load():
        raise SystemExit("the kernels cannot be compiled here")
    names = torch.ops.llama3.variants()
    if variant not in ("", *names):
        raise ValueError(f"--variant must be one of {', '.join(names)}, not {variant!r}")
    torch.ops.llama3.use_variant(variant)
    print(f"{torch.get_num_threads()} threads, {variant or names[0]}")


def linear(
    rows: str = "1",
    shapes: str = SHAPES,
    only: str = "",
    threads: int | None = None,
    seconds: float = 0.5,
    variant: str = "",
    out: str | None = None,
) -> None:
    """Matrix multiplications.

    Args:
        rows: numbers of rows of x, separated by commas.
        shapes: NxK of the weights, separated by commas.
        only: names of columns, separated by commas; all if empty.
        threads: default: as torch chooses.
        seconds: of each column of a line.
        variant: instruction set of the kernels; the fastest if empty.
        out: a JSON file to write.
    """
    Ms, sizes = counts("rows", rows, "2,4,8"), counts("shapes", shapes, "8192x2048,2048x2048")
    begin(threads, out, variant)
    big = torch.arange(1 << 27)  # 1 GiB
    figures: list[Figure] = []
    for [M] in Ms:
        for N, K in sizes:
            calls: Calls = {"read": ([big.sum], big.nbytes)}
            calls |= linear_calls(M, N, K, only)
            row, cells = f"{N} x {K}" + f", {M} rows" * (M > 1), []
            for name, speed in measure(calls, seconds):
                cell = f"{name} {speed:5.1f}"
                figures.append(Figure(row, name, "GB/s", [speed], better="higher"))
                if M > 1 and name != "read":
                    flops = speed / calls[name][1] * 2 * M * N * K
                    figures.append(
                        Figure(row, f"{name}, compute", "GFLOP/s", [flops], better="higher")
                    )
                    cell += f" ({flops:.0f})"
                cells.append(cell)
            print(f"{f'{N}x{K}':>12} x {M:<3} " + "  ".join(cells), flush=True)
    settings = {
        "rows": rows,
        "shapes": shapes,
        "only": only,
        "threads": threads,
        "seconds": seconds,
        "variant": variant,
    }
    result = make_result("kernels linear", settings, figures, row_heading="N x K")
    finish(result, out, show_table=False)


def linear_calls(M: int, N: int, K: int, only: str) -> Calls:
    """Calls of all operators, or of those that `only` names, with enough weights for each."""
    x, calls = torch.randn(M, K).bfloat16(), Calls()
    for name, (operator, new_weights) in contenders(x, N, K).items():
        if only and name not in only.split(","):
            continue
        size = sum(t.nbytes for t in new_weights())
        copies = [new_weights() for _ in range(min(200, max(1, COLD_BYTES // size)))]
        functions: list[Callable[[], Tensor]] = [partial(operator, *each) for each in copies]
        calls[name] = (functions, size)
    return calls


def attention(
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 64,
    shapes: str = "1x128,1x1024,1x4096,128x128,512x512",
    threads: int | None = None,
    seconds: float = 1.0,
    out: str | None = None,
) -> None:
    """Attention of queries at the last positions to all positions.

    Args:
        heads, kv_heads, head_dim: of the layer.
        shapes: queries x positions, separated by commas.
        threads: default: as torch chooses.
        seconds: of each column of a line.
        out: a JSON file to write.
    """
    check_counts(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    sizes = counts("shapes", shapes, "1x128,128x128")
    begin(threads, out)
    figures: list[Figure] = []
    for T, S in sizes:
        calls, cells = attention_calls(T, S, (heads, kv_heads, head_dim)), []
        for name, speed in measure(calls, seconds):
            milliseconds = calls[name][1] / speed / 1e6
            cells.append(f"{name} {milliseconds:8.3f} ms {speed:5.1f} GB/s")
            figures.append(Figure(f"{T} x {S}", name, "ms", [milliseconds], better="lower"))
        print(f"{f'{T}x{S}':>12}  " + "  ".join(cells), flush=True)
    settings = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "shapes": shapes,
        "threads": threads,
        "seconds": seconds,
    }
    heading = "queries x positions"
    result = make_result("kernels attention", settings, figures, row_heading=heading)
    finish(result, out, show_table=False)


def attention_calls(T: int, S: int, sizes: tuple[int, int, int]) -> Calls:
    """Calls of the kernel and of torch for T queries and S positions, with enough caches."""
    heads, kv_heads, head_dim = sizes
    positions = torch.arange(S - T, S).unsqueeze(0)
    mask = None if T in (1, S) else torch.arange(S) <= positions[0].unsqueeze(1)
    xq = torch.randn(1, T, heads, head_dim).bfloat16()
    size = 4 * S * kv_heads * head_dim
    caches = [
        torch.randn(2, 1, S, kv_heads, head_dim).bfloat16()
        for _ in range(min(200, max(1, COLD_BYTES // size)))
    ]
    attend = torch.ops.llama3.attend
    return {
        "kernel": ([partial(attend, xq, k, v, positions) for k, v in caches], size),
        "torch": ([partial(fused_attention, xq, k, v, mask) for k, v in caches], size),
    }


if __name__ == "__main__":
    run_benchmark({"linear": linear, "attention": attention}, "kernels")
