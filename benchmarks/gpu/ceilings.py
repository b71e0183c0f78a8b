"""The ceilings of the device: copying, reading, multiplying."""

from __future__ import annotations

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
