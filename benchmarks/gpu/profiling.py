"""Where a GPU's time goes: the kernels that take most of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.record import Run
from benchmarks.gpu.timing import wait

SHOWN = 8  # kernels in the notes; the log has more


def profile(run: Run, what: str, function: Callable[[], Any], calls: int) -> None:
    """The device's busy time in one of `calls` calls as a figure, and its kernels as notes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recorded

    activities = [ProfilerActivity.CPU]
    if run.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with recorded(activities=activities) as found:
        for _ in range(calls):
            function()
        wait(run.device)
    averages = found.key_averages()
    print(averages.table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=90))
    kernels = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda e: -e.self_device_time_total)
    busy = sum(e.self_device_time_total for e in kernels) / calls
    if busy:
        run.figure(what, "device busy", "us", [busy], "lower")
    for e in kernels[:SHOWN]:
        time, count = e.self_device_time_total / calls, e.count / calls
        run.note(f"{what}: {time:.0f} us in {count:.0f} calls of {e.key[:100]}")
