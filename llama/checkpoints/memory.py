"""Whether a model and its KV cache fit a device, before anything is allocated.

Counts only what is certain, so that nothing that fits is refused: activations are left out, and
weights that are the mapped files themselves.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from llama.checkpoints.footprint import Footprint
from llama.checkpoints.serving import largest
from llama.checkpoints.source import Source
from llama.common.dtypes import dtype_name, parse_dtype
from llama.distributed import job, tensor_parallel
from llama.layers.schemes import SCHEMES, find_scheme, possible_ranks
from llama.model import ModelArgs

LINEARS = ("attention", "feed_forward", "output")
# Of a control group: (folder of its hierarchy, limit, usage, prefix of the names in memory.stat).
GROUP_V1 = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
GROUP_V2 = ("", "memory.max", "memory.current", "")


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on a device; None: unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return host_memory() if device.type == "cpu" else None


def host_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this machine and the control groups of this process allow, swap included.

    None without Linux's /proc.
    """
    try:
        info = _numbers(root / "proc/meminfo")
        swap = info.get("SwapFree", 0) * 1024
        return min([info["MemAvailable"] * 1024, *_left_in_groups(root)]) + swap
    except (OSError, KeyError, ValueError):
        return None


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group of this process, and each one above it, leaves; cgroups(7)."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        hierarchy, limit, usage, prefix = GROUP_V1 if controllers else GROUP_V2
        group = Path(path.lstrip("/"))
        for folder in (root / "sys/fs/cgroup" / hierarchy / p for p in (group, *group.parents)):
            try:
                left = int((folder / limit).read_text()) - int((folder / usage).read_text())
                stat = _numbers(folder / "memory.stat")
                cached = stat[f"{prefix}active_file"] + stat[f"{prefix}inactive_file"]
            except (OSError, KeyError, ValueError):  # not visible here, or its limit is "max"
                continue
            yield left + cached


def _numbers(path: Path) -> dict[str, int]:
    """{name: number} of lines such as "MemFree:  123 kB"."""
    words = (line.split() for line in path.read_text().splitlines())
    return {w[0].rstrip(":"): int(w[1]) for w in words if len(w) > 1 and w[1].isdigit()}


def check_memory(
    source: Source,
    args: ModelArgs,
    device: torch.device,
    dtype: torch.dtype,
    quantize: str | None = None,
    available: Callable[[torch.device], int | None] = available_memory,
) -> None:
    """Raise a ValueError if weights and KV cache cannot fit, saying what would.

    Args:
        args: max_batch_size and max_seq_len are the sizes of the cache.
        quantize: as of `Llama.build`.
        available: bytes that are free on a device; None: unknown, and nothing is refused.
    """
    ranks = tensor_parallel.size()
    scheme = source.quantization or (find_scheme(quantize) if quantize else None)
    if ranks not in possible_ranks(args, scheme):
        return  # the model says so when it is built
    footprint = Footprint(args, source.tied, ranks, dtype_name(dtype), scheme)
    here = job.local_ranks() if device.type == "cpu" else 1  # that share this memory
    weights = here * _allocated(footprint, source, device)
    loaded = here * _allocated(replace(footprint, scheme=None), source, device)
    loading = loaded if scheme and not source.quantization else 0

    def needed(batch: int, context: int) -> int:
        """At least."""
        cache = footprint.cache(batch, context) + footprint.rotary(context)
        return max(loading, weights + here * cache)

    batch, context = args.max_batch_size, args.max_seq_len
    free = available(device)
    if free is None or needed(batch, context) <= free:
        return
    gc.collect()  # what nobody can use any more
    free = available(device)
    if free is None or needed(batch, context) <= free:
        return

    def fits(batch: int, context: int) -> bool:  # with activations: what is proposed can run
        beside = footprint.needed(batch, context) - sum(footprint.weights().values())
        return max(loading, weights + here * beside) <= free

    cache = gigabytes(here * footprint.cache(batch, context))
    raise ValueError(
        f"max_seq_len {context} with max_batch_size {batch} needs "
        f"{gigabytes(needed(batch, context))} ({cache} of it for the KV cache), and "
        f"{gigabytes(free)} are free on {device}; "
        + (_what_fits(fits, batch, context) or _smaller_weights(footprint, free // here))
    )


def _allocated(footprint: Footprint, source: Source, device: torch.device) -> int:
    """Bytes of a rank's weights that are not mapped files."""
    kinds = footprint.weights()
    if device.type != "cpu" or source.layout == "gguf":
        return sum(kinds.values())
    mapped = source.dtype("tok_embeddings.weight") == parse_dtype(footprint.dtype)
    total = 0
    for kind, size in kinds.items():
        quantized = footprint.scheme is not None and kind in LINEARS
        in_files = source.quantization is not None if quantized else mapped
        total += 0 if in_files else size
    return total


def _what_fits(fits: Callable[[int, int], bool], batch: int, context: int) -> str:
    """The sizes of the largest caches, as the end of a message; empty if there are none."""
    tokens, rows = largest(lambda n: fits(batch, n)), largest(lambda n: fits(n, context))
    tokens -= tokens % 256 if tokens > 256 else 0
    proposals = [f"max_seq_len {tokens}"] if tokens else []
    if rows:
        proposals.append(f"max_batch_size {rows}")
    if not proposals and (tokens := largest(lambda n: fits(1, n))):
        proposals.append(f"max_seq_len {tokens} with max_batch_size 1")
    return f"use {' or '.join(proposals)}" if proposals else ""


def _smaller_weights(footprint: Footprint, free: int) -> str:
    """What to do where the weights leave no room, as the end of a message."""
    for scheme in () if footprint.scheme else SCHEMES.values():
        if footprint.ranks not in possible_ranks(footprint.args, scheme):
            continue
        size = sum(replace(footprint, scheme=scheme).weights().values())
        if size < free:
            return f"`llama3 quantize --scheme {scheme.name}` makes the weights {gigabytes(size)}"
    return "use more ranks, each with memory of its own, or a smaller model"


def gigabytes(size: int) -> str:
    """Such as "1.25 GB" or "23,040 GB"."""
    return f"{size // 10**9:,} GB" if size >= 10**11 else f"{size / 1e9:.2f} GB"
