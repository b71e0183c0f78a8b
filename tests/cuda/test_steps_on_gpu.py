"""What a compiled decoding step does on the host: waits, graphs, compilations."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from llama import Engine, Request, Sampling
from tests.cuda.cases import DEVICE, greedy, prompt

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("gpu_only")]

WAYS = {
    "greedy": Sampling(0.0),
    "sampled": Sampling(0.8, 0.9),
}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@contextmanager
def decoding(engine: Engine, sampling: Sampling, rows: int = 3) -> Iterator[Callable[[], object]]:
    """A function that makes one step of `rows` decoding requests, which are cancelled after."""
    requests = [Request(prompt(9, seed=i), 100, sampling) for i in range(rows)]
    generations = [engine.add(request) for request in requests]
    while not all(len(generation.ids) > 4 for generation in generations):
        engine.step()
    torch.cuda.synchronize(DEVICE)
    yield engine.step
    for generation in generations:
        engine.cancel(generation.id)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_waits_once_for_its_ids(compiled: Engine, way: str) -> None:
    counts = []
    with decoding(compiled, WAYS[way]) as step:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(8):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    step()
                counts.append(sum("synchroniz" in str(w.message) for w in caught))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(set(counts)) == 1 and counts[0] <= 2, counts


@pytest.mark.parametrize("way", WAYS)
def test_calls_of_a_step(compiled: Engine, way: str) -> None:
    """Waits, transfers to the host, and launches outside the graph."""
    from torch.profiler import ProfilerActivity, profile

    steps = 8
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with decoding(compiled, WAYS[way]) as step, profile(activities=activities) as found:
        for _ in range(steps):
            step()
    calls = Counter(event.name for event in found.events())
    if not any(name.startswith("cuda") for name in calls):
        pytest.skip("torch.profiler records no CUDA calls here")
    waits = sum(calls[name] for name in WAITS) - 1  # the profiler's own, at the end
    assert waits <= 2 * steps, calls.most_common(20)
    to_host = sum(n for name, n in calls.items() if name.startswith("Memcpy DtoH"))
    assert to_host <= 2 * steps, calls.most_common(20)
    assert calls["cudaGraphLaunch"] >= steps, calls.most_common(20)
    launches = calls["cudaLaunchKernel"] + calls["cudaLaunchKernelExC"]
    assert launches <= 30 * steps, calls.most_common(20)


def test_a_graph_is_captured_once_for_a_shape(
    compiled: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is compiled again, over growing lengths and changing numbers of rows."""
    from torch._dynamo.utils import counters

    counts: Counter[str] = Counter()
    kind = torch.cuda.CUDAGraph

    def spy(name: str) -> Callable[..., None]:
        plain = getattr(kind, name)

        def call(*args: object, **options: object) -> None:
            counts[name] += 1
            plain(*args, **options)

        return call

    for name in ("capture_begin", "replay"):
        monkeypatch.setattr(kind, name, spy(name))

    def work(seed: int) -> None:
        compiled.run([greedy(prompt(n, seed), 30) for n in (240, 5, 12)])
        compiled.run([Request(prompt(n, seed), 12, Sampling(0.9, 0.9)) for n in (3, 500)])
        compiled.run([Request(prompt(7, seed), 12, Sampling(0.7, 0.8), seed=2)])

    work(1)
    assert counts["replay"] >= 50
    captured, graphs = counts["capture_begin"], counters["stats"]["unique_graphs"]
    work(2)
    work(3)
    assert counts["capture_begin"] == captured
    assert counters["stats"]["unique_graphs"] == graphs
