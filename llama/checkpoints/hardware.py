"""The figures of the hardware that a plan runs on: sizes as text, GPUs by name, collectives.

Measures nothing.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

UNITS = {
    "": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15,
    "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40,
}  # fmt: skip
GPUS_A_NODE = 8


@dataclass(frozen=True)
class Hardware:
    """What one rank has. None: unknown; what it limits is left out of a plan.

    Attributes:
        memory: bytes.
        memory_bandwidth, interconnect: bytes a second that a rank reads, and that it sends.
        compute: operations a second in the plan's dtype; a multiplication and an addition are two.
        latency: seconds of a collective beside the transfer of its bytes.
    """

    memory: int | None = None
    memory_bandwidth: float | None = None
    compute: float | None = None
    interconnect: float | None = None
    latency: float = 0.0


# Peaks in NVIDIA's data sheets: bfloat16 without sparsity, NVLink or PCIe in one direction.
GPUS = {
    "a100": Hardware(80 * 10**9, 2.039e12, 312e12, 300e9),  # A100 80GB SXM
    "h100": Hardware(80 * 10**9, 3.35e12, 989e12, 450e9),  # H100 SXM
    "h200": Hardware(141 * 10**9, 4.8e12, 989e12, 450e9),  # H200 SXM
    "l40s": Hardware(48 * 10**9, 864e9, 362e12, 32e9),
}


def gpu(name: str) -> Hardware:
    """A GPU by its name, such as "h100".

    Raises:
        ValueError: the table has no such GPU.
    """
    if name.lower() not in GPUS:
        raise ValueError(
            f"unknown gpu {name!r}; use one of {list(GPUS)}, or give --device_memory, "
            "--memory_bandwidth, --compute and --interconnect"
        )
    return GPUS[name.lower()]


def collective_latency(ranks: int) -> float:
    """Seconds of a small all-reduce with nccl, as nccl estimates it to choose an algorithm.

    `src/graph/tuning.cc` of nccl 2: a ring or a tree, whichever is faster, with the protocol LL, by
    NVLink between the 8 GPUs of a node and by a network between nodes. In microseconds: 6.6 (ring)
    or 6.8 (tree) to start, 0.6 a step within a node (1 beside a network), 2.7 or 5 between nodes.
    """
    if ranks == 1:
        return 0.0
    nodes = math.ceil(ranks / GPUS_A_NODE)
    between = 2 * (nodes - 1)
    within = 2 * (ranks - 1) - between
    ring = 6.6 + within * (0.6 if nodes == 1 else 1.0) + between * 2.7
    tree = 6.8 + 2 * ((ranks // nodes - 1) * 0.6 + (nodes.bit_length() - 1) * 5.0)
    return min(ring, tree) * 1e-6


def parse_size(text: str, name: str, rate: bool = False) -> int:
    """Bytes of "80GB" (10^9), "80GiB" (2^30) or "80e9"; with `rate` bytes a second, "450GB/s".

    Raises:
        ValueError: the text has another form, or is out of range.
    """
    example = "450GB/s" if rate else "80GB"
    found = re.fullmatch(
        r"([0-9.]+(?:[eE]\+?[0-9]+)?) ?(?:(|k|[MGT]|[KMGT]i)B)?(/s)?", text.strip()
    )
    try:
        if found is None or (found[3] and not rate):
            raise ValueError
        size = float(found[1]) * UNITS[found[2] or ""]
    except ValueError:
        bits = "; 8 bits (b) are a byte (B)" if re.search("[kKMGT]i?b", text) else ""
        raise ValueError(f"{name} {text!r} is no size; write it as {example}{bits}") from None
    if not 10**6 <= size < math.inf:  # "80" is a forgotten unit
        raise ValueError(f"{name} {text!r} is {size:g} bytes; write it as {example}")
    return round(size)


def parse_compute(text: str) -> float:
    """Operations a second of "989TFLOPS", "989 TFLOP/s" or "989e12".

    Raises:
        ValueError: the text has another form, or is out of range.
    """
    found = re.fullmatch(r"([0-9.]+(?:[eE]\+?[0-9]+)?) ?(?:([GTP]?)FLOP(?:/s|S|s))?", text.strip())
    try:
        speed = float(found[1]) * UNITS[found[2] or ""] if found else 0.0
    except ValueError:
        speed = 0.0
    if not 10**9 <= speed < math.inf:
        raise ValueError(f"compute {text!r} is no speed; write it as 989TFLOPS")
    return speed


def parse_latency(text: str) -> float:
    """Seconds of "15us", "0.1ms" or "2e-5s".

    Raises:
        ValueError: the text has another form, or is a second or more.
    """
    found = re.fullmatch(r"([0-9.]+(?:[eE][-+]?[0-9]+)?) ?(us|ms|s)", text.strip())
    try:
        seconds = float(found[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[found[2]] if found else -1.0
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1:
        raise ValueError(f"latency {text!r} is no time of a collective; write it as 15us")
    return seconds
