"""job.py, tensor_parallel.py: an error of one rank ends the job, with one message."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from llama.distributed import job, tcp_store, tensor_parallel
from tests.distributed.test_tensor_parallel import free_port, start_torchrun, write

JOB = str(Path(__file__).with_name("rank_job.py"))
ENDS_WITHIN = 60  # seconds; a rank that hangs takes longer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("faults") / "model", vocab_size=261)


def wait_for_failure(job: subprocess.Popen[str]) -> tuple[str, list[str]]:
    """Wait until a job fails; return its stdout, and the lines of its command on stderr."""
    try:
        out, err = job.communicate(timeout=ENDS_WITHIN + 180)  # starting takes most of it
    finally:
        job.kill()
    assert job.returncode != 0
    return out, [line for line in err.splitlines() if line.startswith("job: ")]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("kill", "job: rank 1 no longer answers: it ended, was killed"),
        ("memory", "job: rank 1: OutOfMemoryError: tried to allocate 3.00 GiB"),
        pytest.param(
            "hang",
            "job: rank 1 no longer answers: it ended, was killed",
            marks=pytest.mark.slow,
        ),
        pytest.param("exit", "job: rank 1: SystemExit: 3", marks=pytest.mark.slow),
    ],
)
def test_rank_fails_during_generation(folder: str, fault: str, message: str) -> None:
    command = [JOB, "--ckpt_dir", folder, "--fault", fault]
    wait = {"LLAMA3_RANK_TIMEOUT": "3"} if fault == "hang" else {}
    out, messages = wait_for_failure(start_torchrun(2, *command, **wait))
    assert out == "started\n"
    assert len(messages) == 1 and messages[0].startswith(message)


def test_shard_missing_on_one_rank(folder: str, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_bytes((Path(folder) / "params.json").read_bytes())
    command = [JOB, "--ckpt_dir", folder, "--elsewhere", str(tmp_path)]
    _, messages = wait_for_failure(start_torchrun(2, *command))
    assert messages == [
        f"job: rank 1: FileNotFoundError: no consolidated.*.pth in {tmp_path}; check ckpt_dir"
    ]


def test_rank_fails_while_quantizing(folder: str) -> None:
    """The other rank waits in a collective."""
    _, messages = wait_for_failure(
        start_torchrun(2, JOB, "--ckpt_dir", folder, "--fault", "quantize")
    )
    assert messages == ["job: rank 1: OutOfMemoryError: tried to allocate 3.00 GiB"]


def test_error_of_all_ranks_is_reported_once(folder: str) -> None:
    _, messages = wait_for_failure(start_torchrun(2, JOB, "--ckpt_dir", "/nowhere"))
    assert messages == ["job: no checkpoint folder at /nowhere; check ckpt_dir"]


@pytest.mark.slow
def test_ctrl_c_and_a_second_run(folder: str) -> None:
    """A second job can use the same port at once."""
    launcher = [f"--master_port={free_port()}"]
    command = [JOB, "--ckpt_dir", folder]
    job = start_torchrun(2, *command, "--fault", "never", launcher=launcher)
    assert job.stdout is not None and job.stdout.readline() == "started\n"
    job.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, messages = wait_for_failure(job)
    assert messages == [] and time.monotonic() - start < ENDS_WITHIN
    again = start_torchrun(2, *command, launcher=launcher)
    assert again.communicate(timeout=240)[1].count("Loaded") == 1 and again.returncode == 0


def start_without_torchrun(*command: str) -> list[subprocess.Popen[str]]:
    """Start two ranks without torchrun, so that rank 0 serves the store."""
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    env |= {"MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


@pytest.mark.slow
def test_ranks_without_torchrun(folder: str) -> None:
    """The message variables the killed rank."""
    jobs = start_without_torchrun(JOB, "--ckpt_dir", folder, "--fault", "kill")
    messages = [wait_for_failure(job)[1] for job in jobs]
    assert (
        messages[1] == [] and len(messages[0]) == 1 and "rank 1 no longer answers" in messages[0][0]
    )


@pytest.mark.slow
def test_script_ends_between_calls(folder: str) -> None:
    """The other rank is inside a call of the library."""
    script = (
        "import os; from llama import Llama\n"
        f"llama = Llama.build({folder!r}, None, 64, 1, device='cpu')\n"
        "if os.environ['RANK'] == '1': raise KeyError('mine')\n"
        "llama.generate([[1, 2]], 9)\n"
    )
    texts = [job.communicate(timeout=240)[1] for job in start_without_torchrun("-c", script)]
    assert texts[0].endswith(".RankError: rank 1: KeyError: 'mine'\n")
    assert texts[1].endswith("KeyError: 'mine'\n")


def set_environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


RANK_0 = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1"}, "RANK=1 but not WORLD_SIZE"),
        (RANK_0, "but not MASTER_PORT"),
        (RANK_0 | {"MASTER_PORT": "1", "RANK": "2"}, "RANK=2 in the environment must be a number"),
        (RANK_0 | {"MASTER_PORT": "1", "WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment"),
        (RANK_0 | {"MASTER_PORT": "http"}, "MASTER_PORT=http in the environment must be a number"),
        (RANK_0 | {"MASTER_PORT": "1", "LOCAL_RANK": "1"}, "LOCAL_RANK=1 .* from 0 to 0"),
    ],
)
def test_bad_environments(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    set_environment(monkeypatch, **variables)
    with pytest.raises(ValueError, match=message):
        job.environment()


@pytest.mark.parametrize("variables", [{}, {"RANK": "0"}, {"WORLD_SIZE": "1"}])
def test_one_process(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    set_environment(monkeypatch, **variables)
    assert job.environment() == job.Launch() and job.is_leader()


@pytest.fixture
def rank_0(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The environment of rank 0 of 2. The value is MASTER_PORT, a free port."""
    port = free_port()
    set_environment(monkeypatch, **RANK_0, MASTER_PORT=str(port))
    monkeypatch.setenv(job.TIMEOUT, "0.5")
    monkeypatch.setattr(job, "_store", None)
    yield port


def test_port_in_use(rank_0: int) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", rank_0))
        s.listen()
        with pytest.raises(ValueError, match=f"rank 0 cannot serve MASTER_PORT {rank_0}"):
            job.store()


def test_no_server(rank_0: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match=r"rank 1 of 2 found no rank 0 at 127.0.0.1"):
        job.store()


def test_no_server_on_a_busy_machine(rank_0: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch does not notice in time that nothing listens, the message is the same."""

    def late(*_: object, **__: object) -> None:
        time.sleep(3)

    monkeypatch.setattr(tcp_store, "GRACE", 0.1)
    monkeypatch.setattr(dist, "TCPStore", late)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match=r"rank 1 of 2 found no rank 0 at 127.0.0.1"):
        job.store()


def test_a_server_of_another_program(rank_0: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that accepts and never answers; torch alone waits for it without limit."""
    monkeypatch.setenv("RANK", "1")
    with socket.socket() as s:
        s.bind(("127.0.0.1", rank_0))
        s.listen()
        with pytest.raises(ValueError, match=r"no rank 0: what listens at .* choose another MAST"):
            job.store()


def test_rank_that_does_not_start(rank_0: int) -> None:
    with pytest.raises(ValueError, match=r"rank 1 of 2 did not start within 0.5 s"):
        job.rendezvous({})


@pytest.mark.skipif(dist.is_nccl_available(), reason="this torch has nccl")
def test_missing_backend(rank_0: int) -> None:
    with pytest.raises(ValueError, match="this build of torch has no nccl"):
        tensor_parallel._create_groups(2, "nccl")


def test_two_processes_with_one_rank(rank_0: int) -> None:
    job.store().add("arrived/0", 1)
    with pytest.raises(ValueError, match="two processes have RANK=0"):
        job.rendezvous({})


def test_ranks_of_different_jobs(rank_0: int) -> None:
    job.store().set("facts/1", json.dumps({"WORLD_SIZE": 3, "backend": "gloo"}))
    with pytest.raises(ValueError, match="differ in WORLD_SIZE: 2 on rank 0, 3 on rank 1"):
        job.rendezvous({"backend": "gloo"})


def test_rank_that_failed_before_the_rendezvous(rank_0: int) -> None:
    table = job.store()
    fault = {"rank": 1, "cause": "ImportError", "text": "no gguf"}
    timer = threading.Timer(0.1, lambda: table.set("fault", json.dumps(fault)))
    timer.start()
    with pytest.raises(job.RankError, match=r"^rank 1: ImportError: no gguf$"):
        job.rendezvous({})
    timer.join()


def test_all_lost_ranks_are_named(rank_0: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them may only be busy, such as rank 0 while a user types."""
    monkeypatch.setattr(job, "ANSWER_WITHIN", 0.1)
    job.store().set("alive/1", "")
    fault = job.find_lost_rank([0, 1, 2, 3])
    assert fault is not None
    assert fault.text.startswith("rank 2 no longer answers, nor 3: it ended, was killed")


def test_bad_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("", "soon", "0", "nan", "inf", "1e300"):
        monkeypatch.setenv(job.TIMEOUT, wrong)
        with pytest.raises(
            ValueError, match=r"LLAMA3_RANK_TIMEOUT=.* must be seconds, more than 0"
        ):
            job.timeout()
