"""The ceilings of the device: copying, reading, multiplying."""

from __future__ import annotations

import statistics

from benchmarks.gpu.record import Run
from benchmarks.gpu.timing import copy_speed, matmul_speed, read_speed


def run(run: Run) -> None:
    """Measure them."""
    sizes, device = run.sizes, run.device
    row = run.device.type

    def copy() -> None:
        speeds = copy_speed(device, sizes.copied, 7)
        run.figure(row, "copy (read + written)", "GB/s", speeds, "higher")

    def multiply() -> None:
        speeds = matmul_speed(device, sizes.matrix, 7)
        column = f"bf16 matmul of {sizes.matrix}"
        run.figure(row, column, "TFLOP/s", speeds, "higher")

    def read() -> None:
        run.figure(row, "sum (read)", "GB/s", read_speed(device, sizes.copied, 7), "higher")

    for what in (copy, multiply, read):
        run.attempt(what.__name__, what)


def copy_ceiling(run: Run, row: str) -> float:
    """GB/s of copying, which is also kept as a figure of `row`."""
    ceiling = statistics.median(copy_speed(run.device, run.sizes.copied))
    run.figure(row, "copy ceiling", "GB/s", [ceiling], "higher")
    return ceiling


def matmul_ceiling(run: Run, row: str) -> float:
    """TFLOP/s of a matmul, which is also kept as a figure of `row`."""
    ceiling = statistics.median(matmul_speed(run.device, run.sizes.matrix))
    run.figure(row, "matmul ceiling", "TFLOP/s", [ceiling], "higher")
    return ceiling
