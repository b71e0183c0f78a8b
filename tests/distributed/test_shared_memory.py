"""shared_memory.py and its operators: equal to gloo's bits; another rank's mistakes and its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.distributed import shared_memory
from tests.distributed.test_tensor_parallel import free_port, results

JOB = Path(__file__).with_name("shared_memory_job.py")
ROOT = Path(__file__).parents[2]


def run(case: str, **env: str) -> list[dict[str, Any]]:
    """What two ranks print, without torchrun: it would end one rank when the other is killed."""
    launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    launch |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(JOB), case],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | launch | env | {"RANK": str(r), "LOCAL_RANK": str(r)},
        )
        for r in range(2)
    ]
    try:
        return results("".join(rank.communicate(timeout=120)[0] for rank in ranks))
    finally:
        for rank in ranks:
            rank.kill()


def test_equal_to_gloo(ops: object) -> None:
    first, second = run("equal")
    assert first["wrong"] == second["wrong"] == []
    assert first["digest"] == second["digest"]
    assert first["ids"] == second["ids"] == [7, 2**40]


def test_other_shapes_are_errors_on_both_ranks(ops: object) -> None:
    for found in run("shapes"):
        assert len(found["errors"]) == 4
        assert all("with tensors of other shapes or dtypes" in error for error in found["errors"])
        assert found["sum"] == [2.0, 2.0]


def test_the_end_of_a_rank_is_an_error_at_once(ops: object) -> None:
    killed, left = run("killed")[0], run("leaves")[0]
    assert killed["error"] == "rank 1 of the group has ended" and killed["known"]
    assert left["error"] == "a rank has left the job" and left["known"]


def test_a_rank_that_does_not_answer_is_an_error(ops: object) -> None:
    late = run("late", LLAMA3_RANK_TIMEOUT="1")[0]
    assert late["error"].startswith("rank 1 of the group did not answer within 1") and late["known"]


@pytest.mark.parametrize("lacks", ["operators", "memory", "file", "machine"])
def test_ranks_that_cannot_share_use_the_process_group(
    lacks: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each rank learns it; here the other one is played by the answers to `gather`."""
    others = {"operators": None, "machine": "elsewhere"}

    def gather(value: Any) -> list[Any]:
        return [value, others.get(lacks, value)]

    if lacks == "memory":
        monkeypatch.setattr(os, "memfd_create", lambda *_: (_ for _ in ()).throw(OSError("none")))
    before = os.listdir("/proc/self/fd")
    if lacks == "file":  # the second rank's: another file has the first rank's descriptor
        place: list[Any] = [os.getpid(), os.open(tmp_path, os.O_RDONLY), "00" * 16]
        answers: list[list[Any]] = [["a", "a"], [place, None], [True, False]]
        shared_memory.join(1, 2, 1.0, lambda _: answers.pop(0), True)
        os.close(place[1])
    else:
        shared_memory.join(0, 2, 1.0, gather, True)
    assert shared_memory.for_tensor(torch.zeros(1)) is None
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_forked_child_does_not_leave_for_its_parent(
    ops: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for process, left in ((os.getpid() + 1, False), (os.getpid(), True)):
        shared_memory.join(0, 2, 1.0, lambda value: [value, value], True)
        joined = shared_memory._joined
        assert joined is not None
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda process=process: process)
            shared_memory.leave()
        assert bool(joined.bytes[0]) == left


def test_bad_arguments(ops: Any) -> None:
    x, memory = torch.zeros(4), torch.zeros(1 << 16, dtype=torch.uint8)
    for wrong, message in [
        ((x, memory[:4096], 0, 2, 0, 1.0), "the memory is too small for 2 ranks"),
        ((x, memory.view(2, -1), 0, 2, 0, 1.0), "the memory must be a vector of bytes"),
        ((x, memory, 2, 2, 0, 1.0), "no rank 2 of 2"),
        ((x, memory, 0, 1, 0, 1.0), "no rank 0 of 1"),
        ((x.half(), memory, 0, 2, 0, 1.0), "x must be fp32 or bf16 on the CPU"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.sum_over_ranks(*wrong)
