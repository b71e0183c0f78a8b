"""The processes that torchrun started as one job: who they are, and why they end.

They meet in a store, a small table that torchrun serves (without torchrun, rank 0). It works before
there is a process group and after one broke. Knows nothing about tensors.
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

TIMEOUT = "LLAMA3_RANK_TIMEOUT"  # environment: seconds that a rank may keep the others waiting
ANSWER_WITHIN = 3.0  # seconds for the others to say that they live, once one of them is lost
TELL_WITHIN = 2.0  # seconds for rank 0 to report, before another rank does
POLL = 0.02  # seconds between looks: a store that waits by itself hears no signals


@dataclass(frozen=True)
class Launch:
    """This process's number in the job, how many there are, and its number on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0


@dataclass(frozen=True)
class Fault:
    """Why the job ends: the first that was recorded. `cause` is the name of an exception."""

    rank: int
    cause: str
    text: str

    def exception(self) -> BaseException:
        """What every rank raises."""
        quiet = {"KeyboardInterrupt": KeyboardInterrupt, "BrokenPipeError": BrokenPipeError}
        if self.cause in quiet:
            return quiet[self.cause]()
        if self.cause == RankError.__name__:  # which says whose fault it is
            return RankError(self.text)
        return RankError(f"rank {self.rank}: {self.cause}: {self.text}")


def is_launched() -> bool:
    """Whether this process was started by torchrun (or anything that sets its environment)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_single_process() -> bool:
    """Whether it is the only one of its job."""
    return not is_launched() or os.environ["WORLD_SIZE"] == "1"


def environment() -> Launch:
    """What the environment says; one process if it says nothing.

    Raises:
        ValueError: it says half, or what cannot be.
    """
    given = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    if given in ({}, {"RANK": "0"}, {"WORLD_SIZE": "1"}):
        return Launch()
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    needed = names[:2] if given.get("WORLD_SIZE") == "1" else names
    if absent := [name for name in needed if name not in os.environ]:
        raise ValueError(
            f"the environment has {' and '.join(f'{k}={v}' for k, v in given.items())} but not "
            f"{', '.join(absent)}; start the ranks with torchrun, which sets them all"
        )
    world = _integer("WORLD_SIZE", 1, 1 << 20)
    rank = _integer("RANK", 0, world - 1)
    if world == 1:
        return Launch()
    _integer("MASTER_PORT", 1, 65535)
    return Launch(rank, world, _integer("LOCAL_RANK", 0, rank))


def _integer(name: str, least: int, most: int) -> int:
    text = os.environ[name]
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ValueError(
            f"{name}={text} in the environment must be a number from {least} to {most}; "
            "start the ranks with torchrun, which sets it"
        )
    return int(text)


def local_rank() -> int:
    """This process's number on its machine, which is also the number of its GPU."""
    return _integer("LOCAL_RANK", 0, 1 << 20) if "LOCAL_RANK" in os.environ else 0


def is_leader() -> bool:
    """Whether this process reads the terminal and prints: rank 0 of the whole job."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return not is_launched() or os.environ["RANK"] == "0"


def timeout() -> timedelta:
    """How long a rank may keep the others waiting within a step."""
    text = os.environ.get(TIMEOUT, "60")
    with suppress(ValueError, OverflowError):
        if 0 < (seconds := float(text)) < math.inf:
            return timedelta(seconds=seconds)
    raise ValueError(f"{TIMEOUT}={text} in the environment must be seconds, more than 0")


_store: dist.Store | None = None


def store() -> dist.Store:
    """The job's table, which torchrun serves, else rank 0.

    Raises:
        ValueError: its port is in use, or nobody answers there.
    """
    global _store
    if _store is None:
        me, served = environment(), _served_by_torchrun()
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        serves = me.rank == 0 and not served
        try:
            table = dist.TCPStore(host, port, me.world, serves, timeout(), wait_for_workers=False)
        except RuntimeError as e:
            if serves:
                raise ValueError(
                    f"MASTER_PORT {port} cannot be served, it may be in use: choose another "
                    f"({str(e).splitlines()[0]})"
                ) from None
            raise ValueError(
                f"rank {me.rank} of {me.world} found no rank 0 at {host}:{port} within "
                f"{timeout().total_seconds():g} s; start all ranks, with one MASTER_ADDR and "
                "MASTER_PORT"
            ) from None
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun --max-restarts
        _store = dist.PrefixStore(f"llama3/{attempt}", table)
    return _store


def _served_by_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _reachable() -> dist.Store | None:
    """The store, if it is there without waiting for other ranks."""
    with suppress(ValueError):
        if _store is not None or (
            is_launched() and _served_by_torchrun() and environment().world > 1
        ):
            return store()
    return None


def rendezvous(facts: dict[str, Any]) -> None:
    """Wait until all ranks of the job have come, with the same facts.

    Raises:
        ValueError: some differ, or have not come in time.
    """
    me, table = environment(), store()
    facts = {"WORLD_SIZE": me.world} | facts
    if table.add(f"came/{me.rank}", 1) > 1:
        raise ValueError(f"two processes have RANK={me.rank}; number them 0 to {me.world - 1}")
    table.set(f"facts/{me.rank}", json.dumps(facts))
    absent, end = list(range(me.world)), time.monotonic() + timeout().total_seconds()
    while True:
        come = [r for r in absent if table.check([f"facts/{r}"])]
        absent = [r for r in absent if r not in come]
        check_equal({r: json.loads(table.get(f"facts/{r}")) for r in come} | {me.rank: facts})
        if not absent:
            return
        if (fault := published_fault()) is not None:
            raise fault.exception()
        if time.monotonic() > end:
            raise ValueError(
                f"rank {absent[0]} of {me.world} has not come in {timeout().total_seconds():g} s; "
                f"start all ranks together, or give them longer with {TIMEOUT}"
            )
        time.sleep(POLL)


def check_equal(facts: dict[int, dict[str, Any]]) -> None:
    """Raise a ValueError that names the first fact, by rank, in which two ranks differ."""
    first = min(facts)
    for rank in sorted(facts):
        for name in facts[first] | facts[rank]:
            one, other = facts[first].get(name), facts[rank].get(name)
            if one != other:
                raise ValueError(
                    f"the ranks differ in {name}: {one} on rank {first}, {other} on rank {rank}"
                )


def publish_fault(error: BaseException) -> Fault:
    """Record why this rank ends; the first fault that any rank recorded."""
    return _record(make_fault(error))


def make_fault(error: BaseException) -> Fault:
    """This rank's fault, unrecorded."""
    lines = str(error).strip().splitlines() or [""]
    return Fault(_rank(), type(error).__name__, lines[0])


def _rank() -> int:
    """This process's, also if the environment is wrong."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def _record(fault: Fault) -> Fault:
    with suppress(RuntimeError):  # the store may have gone with its rank
        if (table := _reachable()) is not None:
            first = table.compare_set("fault", "", json.dumps(asdict(fault)))
            return Fault(**json.loads(first))
    return fault


def published_fault() -> Fault | None:
    """The recorded fault, if any rank has ended."""
    with suppress(RuntimeError):
        if (table := _reachable()) is not None and table.check(["fault"]):
            return Fault(**json.loads(table.get("fault")))
    return None


def find_lost_rank(ranks: Sequence[int]) -> Fault | None:
    """Which of the ranks no longer answers, if one does; each rank that lost another asks this."""
    me, silent = _rank(), list(ranks)
    try:
        table, end = _reachable(), time.monotonic() + ANSWER_WITHIN
        if table is None:
            return None
        table.set(f"lives/{me}", "")
        while silent and time.monotonic() < end:
            if (fault := published_fault()) is not None:
                return fault
            silent = [r for r in silent if not table.check([f"lives/{r}"])]
            time.sleep(POLL)
    except RuntimeError:
        silent = [0]  # which served the store
    if not silent:
        return None
    others = "".join(f", nor {rank}" for rank in silent[1:])
    why = (
        f"rank {silent[0]} no longer answers{others}: it ended, was killed (perhaps for want of "
        f"memory), or kept the others waiting for {timeout().total_seconds():g} s ({TIMEOUT})"
    )
    return _record(Fault(silent[0], RankError.__name__, why))


def claim_report() -> bool:
    """Whether this process is the one of the job that reports its end: rank 0 while it lives."""
    with suppress(RuntimeError):
        table = _reachable()
        if table is None:
            return True
        end = time.monotonic() + (0 if is_leader() else TELL_WITHIN)
        while time.monotonic() < end and not table.check(["told"]):
            time.sleep(POLL)
        return bool(table.add("told", 1) == 1)
    return True
