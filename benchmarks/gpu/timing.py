"""Timing on a GPU by events, and the ceilings that speeds are compared with. Knows no model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def wait(device: torch.device) -> None:
    """Until the device has done all that was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    function: Callable[[], Any], device: torch.device, runs: int = 5, calls: int = 5, warm: int = 2
) -> list[float]:
    """Seconds of a call, in each of `runs` runs of `calls` calls without a pause.

    Args:
        warm: calls before, which do not count.
    """
    for _ in range(warm):
        function()
    wait(device)
    if device.type != "cuda":
        return host_seconds(function, device, runs, calls)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for before, after in marks:
        before.record()
        for _ in range(calls):
            function()
        after.record()
    wait(device)
    return [before.elapsed_time(after) / 1e3 / calls for before, after in marks]


def host_seconds(
    function: Callable[[], Any], device: torch.device, runs: int, calls: int
) -> list[float]:
    """As `seconds_of` by the host's clock: with what the host does, and a wait after each run."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        wait(device)
        times.append((time.perf_counter() - start) / calls)
    return times


def graphed(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`function` as a CUDA graph; itself on other devices."""
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@contextmanager
def replays_seen() -> Iterator[list[Any]]:
    """A block in which the CUDA graphs that are replayed are appended to a list."""
    seen: list[Any] = []
    kind: Any = torch.cuda.CUDAGraph
    plain = kind.replay

    def replay(self: Any) -> None:
        seen.append(self)
        plain(self)

    kind.replay = replay
    try:
        yield seen
    finally:
        kind.replay = plain


def copy_speed(device: torch.device, size: int, runs: int = 5) -> list[float]:
    """GB/s of a copy on the device, bytes read and bytes written."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    times = seconds_of(lambda: target.copy_(source), device, runs)
    return [2 * source.nbytes / t / 1e9 for t in times]


def read_speed(device: torch.device, size: int, runs: int = 5) -> list[float]:
    """GB/s of a sum on the device."""
    source = torch.ones(size // 4, device=device)
    times = seconds_of(source.sum, device, runs)
    return [source.nbytes / t / 1e9 for t in times]


def matmul_speed(device: torch.device, n: int, runs: int = 5) -> list[float]:
    """TFLOP/s of a matmul of two n x n matrices of random numbers in bf16."""
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    out: Tensor = torch.empty_like(a)
    times = seconds_of(lambda: torch.mm(a, b, out=out), device, runs, warm=5)
    return [2 * n**3 / t / 1e12 for t in times]
