"""Sums over the ranks of one machine through memory that they share, for tensors on the CPU.

gloo takes about 100 us for the few kilobytes of a decoding step, this a few. The operators are in
`layers/kernels/shared_memory.cpp`; without them, or on several machines, ranks use gloo as before.
The memory has no name in /dev/shm, so nothing is left when a rank is killed, and it does not count
against the size of /dev/shm.
"""

from __future__ import annotations

import mmap
import os
import secrets
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 18  # bytes of one of a rank's two buffers; larger tensors are exchanged in pieces
MOST = 1 << 24  # bytes of all buffers
CONTROL, STATE = 4096, 128  # bytes before the buffers: once, and for each rank
NONCE = slice(64, 96)  # of the control block: tells this file from another one
SUMMED = (torch.float32, torch.bfloat16)  # dtypes
MACHINE = Path("/proc/sys/kernel/random/boot_id")
Gather = Callable[[Any], list[Any]]  # every rank's value, in the order of ranks


@dataclass(frozen=True)
class SharedMemory:
    """This rank's view of the memory.

    Args:
        bytes: a vector of uint8, mapped by all ranks.
        file: its descriptor; this rank has locked the byte of its number there.
        timeout: seconds that a rank waits for another one.
        process: the id of this rank; a forked child does not speak for it.
    """

    bytes: Tensor
    file: int
    rank: int
    ranks: int
    timeout: float
    process: int

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, in fp32 and in the order of ranks: the same bits on all of them.

        Raises:
            torch.distributed.DistBackendError: a rank ended, left or did not answer in time.
            RuntimeError: another rank's tensor has another shape or dtype.
        """
        y: Tensor = torch.ops.llama3.sum_over_ranks(
            x, self.bytes, self.rank, self.ranks, self.file, self.timeout
        )
        return y

    def stack(self, x: Tensor) -> Tensor:
        """(ranks, ...), the tensors of all ranks. Raises as `sum`."""
        y: Tensor = torch.ops.llama3.stack_over_ranks(
            x, self.bytes, self.rank, self.ranks, self.file, self.timeout
        )
        return y

    def close(self) -> None:
        """Let ranks that wait for this one fail at once."""
        if os.getpid() == self.process:
            torch.ops.llama3.leave_ranks(self.bytes)
        os.close(self.file)


_joined: SharedMemory | None = None  # of this rank's model-parallel group


def for_tensor(x: Tensor) -> SharedMemory | None:
    """What exchanges `x`; None: the process group does. All ranks of a group decide alike."""
    if _joined is None or x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return None if torch.is_grad_enabled() and x.requires_grad else _joined


def for_sum(x: Tensor) -> SharedMemory | None:
    """The same for a sum."""
    return for_tensor(x) if x.dtype in SUMMED else None


def join(rank: int, ranks: int, timeout: float, gather: Gather, available: bool) -> None:
    """Share memory from now on, on all ranks or on none. All ranks call it at the same time.

    Args:
        timeout: seconds that a rank waits for another one.
        gather: exchanges values between the ranks, see `tensor_parallel.gather_json`.
        available: whether this rank has the operators.
    """
    global _joined
    machine = MACHINE.read_text() if available and MACHINE.is_file() else None
    machines = gather(machine)
    if _joined is not None or None in machines or len(set(machines)) > 1:
        return
    size = CONTROL * (1 + -(-ranks * STATE // CONTROL))
    size += 2 * ranks * max(CONTROL, min(PIECE, MOST // (2 * ranks) // CONTROL * CONTROL))
    created = _create(size) if rank == 0 else None
    place = gather(created and [os.getpid(), *created])[0]
    file = created[0] if created else _open(place, size)
    memory = None if file is None else _map(file, size, rank, place)
    if all(gather(memory is not None)) and memory is not None and file is not None:
        _joined = SharedMemory(memory, file, rank, ranks, timeout, os.getpid())
    elif file is not None:
        os.close(file)


def leave() -> None:
    """Use the process group again. Ranks that wait for this one in shared memory fail at once."""
    global _joined
    if _joined is not None:
        _joined.close()
    _joined = None


def _create(size: int) -> tuple[int, str] | None:
    """(descriptor of a new file, its nonce); None if the system has no such memory."""
    try:
        file = os.memfd_create("llama3", os.MFD_CLOEXEC)
    except OSError:
        return None
    nonce = secrets.token_hex(16)
    try:
        os.posix_fallocate(file, 0, size)  # else a write could end the process
        os.pwrite(file, nonce.encode(), NONCE.start)
    except OSError:
        os.close(file)
        return None
    return file, nonce


def _open(place: list[Any] | None, size: int) -> int | None:
    """The first rank's file; None if this rank cannot open it, as from another container."""
    if place is None:
        return None
    path = f"/proc/{place[0]}/fd/{place[1]}"
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    if os.fstat(file).st_size == size:
        return file
    os.close(file)
    return None


def _map(file: int, size: int, rank: int, place: list[Any]) -> Tensor | None:
    """The memory of a file, once this rank has locked its byte of it; None: not the right file."""
    import fcntl  # not on Windows

    lock = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, rank, 1, 0)
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        memory = torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)
    except (OSError, ValueError):
        return None
    return memory if bytes(memory[NONCE].tolist()) == place[2].encode() else None
