"""ranks.py: `llama3 serve` on two ranks answers as on one, and ends as one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama import Llama
from llama.checkpoints.adapter import write_adapter
from llama.checkpoints.open import open_checkpoint
from llama.common.errors import QueueFull
from llama.engine.request import Generation, Request
from llama.server.ranks import LeadingEngine
from tests.adapters import random_adapter
from tests.distributed.test_tensor_parallel import free_port, write
from tests.server.raw import post
from tests.server.running import wait_for

COMPLETE = "/v1/completions"
LONG = {"prompt": "a", "max_tokens": 150, "ignore_eos": True, "temperature": 0}


class Job:
    """`llama3 serve` on two ranks."""

    def __init__(self, folder: str):
        self.port = free_port()
        env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        env |= {"MASTER_PORT": str(free_port())}
        command = [sys.executable, "-m", "llama", "serve", "-m", folder, "--port", str(self.port)]
        command += [
            "--adapter",
            f"poet={folder}-adapter",
            "--max_seq_len",
            "200",
            "--device",
            "cpu",
            "--dtype",
            "fp32",
        ]
        self.ranks = [
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(2)
        ]
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60)
        out = self.ranks[0].stdout
        assert out is not None and "poet answer at" in out.readline()

    def end(self) -> list[tuple[int, str]]:
        """Wait for the end: the exit code and the stderr of each rank."""
        errors = [rank.communicate(timeout=60)[1] for rank in self.ranks]
        return [(rank.returncode, err) for rank, err in zip(self.ranks, errors, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = Path(write(tmp_path_factory.mktemp("ranks") / "model", vocab_size=261))
    sidecar = folder / "tokenizer.model.json"
    spec = json.loads(sidecar.read_text()) | {"stop_tokens": ["<|im_end|>"]}  # grammars need one
    sidecar.write_text(json.dumps(spec))
    adapter, source = Path(f"{folder}-adapter"), open_checkpoint(folder)
    adapter.mkdir()
    write_adapter(adapter, source, *random_adapter(1, source.args(), rank=2, alpha=2.0))
    return str(folder)


@pytest.fixture
def job(folder: str) -> Iterator[Job]:
    running = Job(folder)
    yield running
    running.http.close()
    for rank in running.ranks:
        rank.kill()
        rank.communicate()


def test_requests_that_the_engine_begins_count_once(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their ids are those of the engine, which may have had requests before."""
    with Llama.build(folder, None, 200, 1, device="cpu", dtype="fp32") as llama:
        llama.text_completion(["a"], max_gen_len=1)
        engine = llama.engine
        leading, queue, counts = LeadingEngine(engine, 3), engine.queue_siblings, list[int]()

        def count(generations: Sequence[Generation]) -> None:
            queue(generations)
            now = leading.metrics()
            counts.append(now.waiting + now.running)

        monkeypatch.setattr(engine, "queue_siblings", count)
        groups = [[Generation(Request([1, 2], 2))] for _ in range(4)]
        for group in groups:
            leading.queue_siblings(group)
        with pytest.raises(QueueFull):
            leading.queue_siblings([Generation(Request([1, 2], 2))])
        given = [generation.id for [generation] in groups]
        leading.step()
        assert counts == [4] * 4
        assert given == [generation.id for [generation] in groups] == [2, 3, 4, 5]
        leading.cancel(given[-1])
        while leading.busy:
            leading.step()
        reasons = [generation.finish_reason for [generation] in groups]
        assert reasons == ["length"] * 3 + ["cancelled"]


def streamed(http: httpx.Client, body: dict[str, Any]) -> str:
    with http.stream("POST", COMPLETE, json=body | {"stream": True}) as response:
        events = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def test_answers_cancels_and_the_end(job: Job, folder: str) -> None:
    http = job.http
    with Llama.build(folder, None, 200, 1, device="cpu", dtype="fp32") as one_rank:
        for prompt in ("Once", "The capital of"):
            [want] = one_rank.text_completion([prompt], temperature=0, max_gen_len=20)
            body = {"prompt": prompt, "max_tokens": 20, "temperature": 0}
            answer = http.post(COMPLETE, json=body | {"n": 2}).json()
            assert [choice["text"] for choice in answer["choices"]] == [want["generation"]] * 2
            assert streamed(http, body) == want["generation"]
    adapters = {"poet": f"{folder}-adapter"}
    with Llama.build(folder, None, 200, 1, device="cpu", dtype="fp32", adapters=adapters) as llama:
        [poem] = llama.text_completion(["Once"], 0.0, max_gen_len=20, adapter="poet")
        [want] = llama.text_completion(["Once"], 0.0, max_gen_len=20)
    body = {"prompt": "Once", "max_tokens": 20, "temperature": 0, "model": "poet"}
    assert http.post(COMPLETE, json=body).json()["choices"][0]["text"] == poem["generation"]
    assert poem["generation"] != want["generation"]
    # A client that goes away, and one that stops at a text: both cancel on every rank.
    with socket.create_connection(("127.0.0.1", job.port)) as sock:
        sock.sendall(post(COMPLETE, LONG))
    whole = http.post(COMPLETE, json=LONG).json()["choices"][0]["text"]
    stopped = http.post(COMPLETE, json=LONG | {"stop": whole[40:50]}).json()["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == whole[: whole.index(whole[40:50])]
    assert http.post(COMPLETE, json=LONG | {"prompt": [999]}).status_code == 400
    assert http.post(COMPLETE, json=LONG).json()["choices"][0]["text"] == whole
    check_what_rank_0_alone_knows(http)
    for rank in job.ranks:
        rank.send_signal(signal.SIGTERM)
    assert [code for code, _ in job.end()] == [0, 0]


def check_what_rank_0_alone_knows(http: httpx.Client) -> None:
    """Grammars, biases, penalties and seeds."""
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"enum": ["x", "yz"]}}}
    schema |= {"required": ["a"], "additionalProperties": False}
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        "frequency_penalty": 1.5,
        "temperature": 1.0,
        "seed": 7,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 3,
    }
    one, other = (http.post("/v1/chat/completions", json=body).json() for _ in range(2))
    messages = [[choice["message"] for choice in reply["choices"]] for reply in (one, other)]
    assert messages[0] == messages[1]
    for choice in one["choices"]:
        assert json.loads(choice["message"]["content"])["a"] in ("x", "yz")
        assert all(len(entry["top_logprobs"]) == 3 for entry in choice["logprobs"]["content"])
    biased = LONG | {"max_tokens": 5, "logit_bias": {"65": 100}}
    assert http.post(COMPLETE, json=biased).json()["choices"][0]["text"] == "AAAAA"


@pytest.mark.slow
def test_a_rank_is_lost(job: Job) -> None:
    """While nothing is asked; a client sees it within seconds."""
    job.ranks[1].kill()
    wait_for(lambda: job.http.get("/health").status_code == 503)
    (code, err), _ = job.end()
    assert code == 2 and err.splitlines()[-1].startswith("llama3: rank 1 no longer answers")
