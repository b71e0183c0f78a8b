"""The ranks that torchrun started as one job: environment, rendezvous, and faults.

The ranks exchange small values through a store, a TCP key-value table that torchrun serves (rank 0
without torchrun). The store works before the process group exists and after it has broken. Knows
nothing about tensors.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from llama.common.errors import RankError as RankError
from llama.common.errors import Terminated as Terminated
from llama.distributed.tcp_store import open_store

TIMEOUT = "LLAMA3_RANK_TIMEOUT"  # environment variable: see `timeout`
ANSWER_WITHIN = 3.0  # seconds in which a live rank answers `find_lost_rank`
REPORT_WITHIN = 2.0  # seconds for rank 0 to claim the error report before another rank does
POLL = 0.02  # seconds between polls; a blocking wait of the store would delay signal handlers


@dataclass(frozen=True)
class Launch:
    """This process's rank, the number of ranks in the job, and its rank on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0


@dataclass(frozen=True)
class Fault:
    """The error that ends the job: class name `cause`, and the first line of its message."""

    rank: int
    cause: str
    text: str

    def exception(self) -> BaseException:
        """The exception that every rank raises."""
        quiet = {"KeyboardInterrupt": KeyboardInterrupt, "BrokenPipeError": BrokenPipeError}
        if self.cause in quiet:
            return quiet[self.cause]()
        if self.cause == RankError.__name__:  # its message already names the rank
            return RankError(self.text)
        return RankError(f"rank {self.rank}: {self.cause}: {self.text}")


def is_launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_single_process() -> bool:
    """Whether this process is the only one of its job."""
    return not is_launched() or os.environ["WORLD_SIZE"] == "1"


def environment() -> Launch:
    """Read RANK, WORLD_SIZE and LOCAL_RANK. Without them the job is one process.

    Raises:
        ValueError: a variable is missing or out of range.
    """
    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    if found in ({}, {"RANK": "0"}, {"WORLD_SIZE": "1"}):
        return Launch()
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    needed = names[:2] if found.get("WORLD_SIZE") == "1" else names
    if absent := [name for name in needed if name not in os.environ]:
        raise ValueError(
            f"the environment has {' and '.join(f'{k}={v}' for k, v in found.items())} but not "
            f"{', '.join(absent)}; start the ranks with torchrun, which sets them all"
        )
    world = _read_integer("WORLD_SIZE", 1, 1 << 20)
    rank = _read_integer("RANK", 0, world - 1)
    if world == 1:
        return Launch()
    _read_integer("MASTER_PORT", 1, 65535)
    return Launch(rank, world, _read_integer("LOCAL_RANK", 0, rank))


def _read_integer(name: str, low: int, high: int) -> int:
    text = os.environ[name]
    if not text.isdecimal() or not low <= int(text) <= high:
        raise ValueError(
            f"{name}={text} in the environment must be a number from {low} to {high}; "
            "start the ranks with torchrun, which sets it"
        )
    return int(text)


def local_rank() -> int:
    """This process's rank on its machine, which is also the index of its GPU."""
    return _read_integer("LOCAL_RANK", 0, 1 << 20) if "LOCAL_RANK" in os.environ else 0


def local_ranks() -> int:
    """How many ranks run on this machine; 1 without torchrun."""
    name = "LOCAL_WORLD_SIZE"
    return _read_integer(name, 1, 1 << 20) if name in os.environ else 1


def is_leader() -> bool:
    """Whether this is rank 0 of the job, which reads stdin and prints."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return not is_launched() or os.environ["RANK"] == "0"


def timeout() -> timedelta:
    """How long a rank waits for another within a step: LLAMA3_RANK_TIMEOUT, in seconds."""
    text = os.environ.get(TIMEOUT, "60")
    with suppress(ValueError, OverflowError):
        if 0 < (seconds := float(text)) < math.inf:
            return timedelta(seconds=seconds)
    raise ValueError(f"{TIMEOUT}={text} in the environment must be seconds, more than 0")


_store: dist.Store | None = None


def store() -> dist.Store:
    """The job's key-value store. Rank 0 serves it where torchrun does not.

    Raises:
        ValueError: MASTER_PORT is in use, or no rank 0 answers there within `timeout`.
    """
    global _store
    if _store is None:
        launch, served = environment(), _served_by_torchrun()
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = launch.rank == 0 and not served
        try:
            table = open_store(host, port, launch.world, serves, timeout())
        except TimeoutError as e:
            raise ValueError(
                f"rank {launch.rank} of {launch.world} found no rank 0: {e}; if it is another "
                "program, choose another MASTER_PORT on all ranks"
            ) from None
        except RuntimeError as e:
            if serves:
                reason = str(e).splitlines()[0]
                raise ValueError(
                    f"rank 0 cannot serve MASTER_PORT {port}: {reason}; choose another port"
                ) from None
            raise ValueError(
                f"rank {launch.rank} of {launch.world} found no rank 0 at {host}:{port} within "
                f"{timeout().total_seconds():g} s; start all ranks, with the same MASTER_ADDR "
                "and MASTER_PORT"
            ) from None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun --max-restarts
        _store = dist.PrefixStore(f"llama3/{attempt}", table)
    return _store


def _served_by_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _reachable() -> dist.Store | None:
    """The store, or None where opening it would wait for other ranks."""
    with suppress(ValueError):
        if _store is not None or (
            is_launched() and _served_by_torchrun() and environment().world > 1
        ):
            return store()
    return None


def rendezvous(facts: dict[str, Any]) -> None:
    """Wait until all ranks of the job have called this with the same facts.

    Raises:
        ValueError: the facts differ, or a rank did not call within `timeout`.
        RankError: another rank failed before it got here.
    """
    launch, table = environment(), store()
    facts = {"WORLD_SIZE": launch.world} | facts
    if table.add(f"arrived/{launch.rank}", 1) > 1:
        raise ValueError(
            f"two processes have RANK={launch.rank}; number the ranks 0 to {launch.world - 1}"
        )
    table.set(f"facts/{launch.rank}", json.dumps(facts))
    absent, deadline = list(range(launch.world)), time.monotonic() + timeout().total_seconds()
    while True:
        arrived = [r for r in absent if table.check([f"facts/{r}"])]
        absent = [r for r in absent if r not in arrived]
        others = {r: json.loads(table.get(f"facts/{r}")) for r in arrived}
        check_equal(others | {launch.rank: facts})
        if not absent:
            return
        if (fault := published_fault()) is not None:
            raise fault.exception()
        if time.monotonic() > deadline:
            raise ValueError(
                f"rank {absent[0]} of {launch.world} did not start within "
                f"{timeout().total_seconds():g} s; start all ranks together, or raise {TIMEOUT}"
            )
        time.sleep(POLL)


def check_equal(facts: dict[int, dict[str, Any]]) -> None:
    """Raise a ValueError that names the first value in which two ranks differ.

    Args:
        facts: {rank: {name: value}}.
    """
    first = min(facts)
    for rank in sorted(facts):
        for name in facts[first] | facts[rank]:
            one, other = facts[first].get(name), facts[rank].get(name)
            if one != other:
                raise ValueError(
                    f"the ranks differ in {name}: {one} on rank {first}, {other} on rank {rank}"
                )


def publish_fault(error: BaseException) -> Fault:
    """Store this rank's error unless a fault is stored already; return the stored fault."""
    return _publish(make_fault(error))


def make_fault(error: BaseException) -> Fault:
    """The fault of this rank, not written to the store."""
    lines = str(error).strip().splitlines() or [""]
    return Fault(_rank(), type(error).__name__, lines[0])


def _rank() -> int:
    """This process's rank; 0 where RANK is not a number."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def _publish(fault: Fault) -> Fault:
    with suppress(RuntimeError):  # the rank that served the store may have ended
        if (table := _reachable()) is not None:
            first = table.compare_set("fault", "", json.dumps(asdict(fault)))
            return Fault(**json.loads(first))
    return fault


def published_fault() -> Fault | None:
    """The fault that is in the store, or None."""
    with suppress(RuntimeError):
        if (table := _reachable()) is not None and table.check(["fault"]):
            return Fault(**json.loads(table.get("fault")))
    return None


def find_lost_rank(ranks: Sequence[int]) -> Fault | None:
    """Find which of `ranks` no longer runs; None if all answer.

    Every rank that lost the connection to another calls this, and so shows that it is alive. A
    fault that is in the store already is returned at once.
    """
    silent = list(ranks)
    try:
        table, deadline = _reachable(), time.monotonic() + ANSWER_WITHIN
        if table is None:
            return None
        table.set(f"alive/{_rank()}", "")
        while silent and time.monotonic() < deadline:
            if (fault := published_fault()) is not None:
                return fault
            silent = [r for r in silent if not table.check([f"alive/{r}"])]
            time.sleep(POLL)
    except RuntimeError:
        silent = [0]  # rank 0 served the store
    if not silent:
        return None
    text = f"rank {silent[0]} no longer answers" + "".join(f", nor {r}" for r in silent[1:])
    text += ": it ended, was killed (perhaps out of memory), or kept the others waiting for "
    text += f"{timeout().total_seconds():g} s ({TIMEOUT})"
    return _publish(Fault(silent[0], RankError.__name__, text))


def claim_report() -> bool:
    """Whether this rank prints the job's error; True on one rank, on rank 0 unless it is lost."""
    with suppress(RuntimeError):
        table = _reachable()
        if table is None:
            return True
        deadline = time.monotonic() + (0 if is_leader() else REPORT_WITHIN)
        while time.monotonic() < deadline and not table.check(["reported"]):
            time.sleep(POLL)
        return bool(table.add("reported", 1) == 1)
    return True
