"""worker.py, ticket.py, threads.py: the queue's bound, deadlines, failures, figures, the log."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from llama import Llama
from llama.server import app
from llama.server.replies import CompletionReply
from llama.server.threads import Threads
from tests.server.running import RunningServer, generations, slowed, wait_for

COMPLETE = "/v1/completions"
CHAT = "/v1/chat/completions"
LONG = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
HELLO = [{"role": "user", "content": "Hello"}]


def test_a_burst_never_passes_the_queue(
    start_server: Callable[..., RunningServer], tiny_llama: Llama
) -> None:
    """SERVER.md 2.12: 4 slots and a queue of 3 take 7 of 20."""
    server = start_server(max_queue=3).wait_until_ready()
    body = LONG | {"max_tokens": 20}
    with slowed(tiny_llama, 0.02), server.http() as http, ThreadPoolExecutor(20) as pool:
        found = list(pool.map(lambda _: http.post(COMPLETE, json=body), range(20)))
    refused = [response for response in found if response.status_code == 503]
    assert len(refused) == 13
    assert all(response.headers["retry-after"] == "2" for response in refused)
    assert refused[0].json()["error"]["code"] == "queue_full"
    assert {r.json()["usage"]["completion_tokens"] for r in found if r.status_code == 200} == {20}


def test_more_prompts_than_may_ever_wait(start_server: Callable[..., RunningServer]) -> None:
    """A 400: to try again, as after a 503, would not help."""
    server = start_server(max_queue=3).wait_until_ready()
    with server.http() as http:
        for body in ({"prompt": ["a"] * 8}, {"prompt": ["a"] * 4, "n": 2}, {"prompt": "a", "n": 8}):
            refused = http.post(COMPLETE, json=LONG | {"max_tokens": 1} | body)
            assert refused.status_code == 400, refused.text
            assert "only 7 may run and wait" in refused.json()["error"]["message"]
        assert http.post(COMPLETE, json={"prompt": ["a"] * 7, "max_tokens": 1}).status_code == 200


def test_while_loading(start_server: Callable[..., RunningServer], tiny_llama: Llama) -> None:
    may_load = threading.Event()

    def open_llama() -> Llama:
        assert may_load.wait(60)
        return tiny_llama

    server = start_server(open_llama)
    with server.http() as http:
        health = http.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "loading"
        assert http.get("/").status_code == http.get("/metrics").status_code == 200
        for response in (http.get("/v1/models"), http.post(COMPLETE, json=LONG)):
            assert response.status_code == 503 and response.headers["retry-after"]
        may_load.set()
        server.wait_until_ready()
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_request_timeout(
    start_server: Callable[..., RunningServer], tiny_llama: Llama, stream: bool
) -> None:
    """In the queue, and where nothing was streamed, a status; else an event of the stream."""
    server = start_server(request_timeout=0.5).wait_until_ready()
    body = LONG | {"stream": stream}
    with slowed(tiny_llama, 0.02), server.http() as http, ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda _: http.post(COMPLETE, json=body), range(5)))
        wait_for(lambda: not tiny_llama.engine.busy)
    late = [response for response in found if response.status_code == 504]
    assert len(late) == (1 if stream else 5)
    assert {response.headers["x-should-retry"] for response in late} == {"false"}
    for response in found:
        if response.status_code == 200:
            last = response.text.split("\n\n")[-2]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


def test_one_request_fails_and_no_other(
    server: RunningServer, tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as out of memory in the prefill of one prompt."""
    original = tiny_llama.model.hidden

    def hidden(tokens: object, *args: object, **options: object) -> object:
        if getattr(tokens, "shape", (0, 0))[1] > 100:
            raise MemoryError("secret words")
        return original(tokens, *args, **options)  # type: ignore[arg-type]

    with server.http() as http, ThreadPoolExecutor(1) as pool:
        other = pool.submit(http.post, COMPLETE, json=LONG | {"max_tokens": 60})
        wait_for(lambda: any(generation.ids for generation in generations(server)))
        monkeypatch.setattr(tiny_llama.model, "hidden", hidden)
        failed = http.post(COMPLETE, json=LONG | {"prompt": "word " * 200})
        monkeypatch.undo()
        assert failed.status_code == 500 and "secret" not in failed.text
        assert other.result().json()["usage"]["completion_tokens"] == 60
        assert http.get("/health").status_code == 200


def test_megabytes_of_text_do_not_delay_others(server: RunningServer) -> None:
    """They are read in a thread. The answer is that they are too long."""
    text = "The quick brown fox jumps over the lazy dog. " * 60_000
    with server.http() as http, ThreadPoolExecutor(1) as pool:
        long = pool.submit(http.post, CHAT, json={"messages": [{"role": "user", "content": text}]})
        answered = 0
        while not long.done():
            assert http.get("/health").status_code == 200
            answered += 1
            time.sleep(0.01)
        assert long.result().json()["error"]["code"] == "context_length_exceeded"
        assert answered > 3


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "a " * 300, "echo": True, "max_tokens": 1},
        {"prompt": "a " * 300, "echo": True, "max_tokens": 1, "stream": True},
        {"max_tokens": 300},
    ],
    ids=["echo", "streamed echo", "long"],
)
def test_many_log_probabilities_do_not_delay_others(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, body: dict[str, object]
) -> None:
    """They are written in a thread."""
    piece, entered, answered = CompletionReply.piece, threading.Event(), threading.Event()
    waited: list[bool] = []

    def slow(*arguments: Any) -> Any:
        entered.set()
        waited.append(answered.wait(5))
        return piece(*arguments)

    monkeypatch.setattr(CompletionReply, "piece", slow)
    with server.http() as http, ThreadPoolExecutor(1) as pool:
        long = pool.submit(http.post, COMPLETE, json=LONG | {"logprobs": 2} | body)
        assert entered.wait(60)
        assert http.get("/health").status_code == 200
        answered.set()
        assert long.result().status_code == 200
    assert waited and all(waited)


def test_threads_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each counts only while it runs."""

    async def calls() -> None:
        threads = Threads(most=1)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse_to_start)
            with pytest.raises(RuntimeError, match="no more threads"):
                await threads.run(lambda: 1, 5)
        assert await threads.run(lambda: 2, 5) == 2

    def refuse_to_start(_: object) -> None:
        raise RuntimeError("no more threads")

    asyncio.run(calls())


def test_what_takes_long_to_read_is_refused(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SERVER.md 2.15, where the grammar's own limits have a gap."""
    ended = threading.Event()

    def endless(*_: object) -> None:
        ended.wait(60)

    monkeypatch.setattr(app, "constraint", endless)
    monkeypatch.setattr(app, "PREPARED_WITHIN", 0.2)
    body = {"messages": HELLO, "response_format": {"type": "json_object"}}
    with server.http() as http:
        refused = http.post(CHAT, json=body)
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "too_complex"
        assert http.get("/health").status_code == 200
    ended.set()


def test_metrics(start_server: Callable[..., RunningServer]) -> None:
    server = start_server().wait_until_ready()
    with server.http() as http:
        before = figures(http)
        usage = [http.post(COMPLETE, json=LONG | {"max_tokens": 7}).json()["usage"] for _ in "ab"]
        http.post(COMPLETE, json={})
        http.get("/v1/nothing/at/all")
        found = figures(http)

    def grown(name: str) -> float:
        return found.get(name, 0) - before.get(name, 0)

    assert grown("llama3_generated_tokens_total") == 14
    assert grown("llama3_prompt_tokens_total") == sum(u["prompt_tokens"] for u in usage)
    cached = sum(u["prompt_tokens_details"]["cached_tokens"] for u in usage)
    assert grown("llama3_cached_tokens_total") == cached
    assert grown("llama3_time_to_first_token_seconds_count") == 2
    assert grown('llama3_finished_total{reason="length"}') == 2
    assert grown(f'llama3_requests_total{{path="{COMPLETE}",status="200"}}') == 2
    assert grown(f'llama3_requests_total{{path="{COMPLETE}",status="400"}}') == 1
    assert grown('llama3_requests_total{path="other",status="404"}') == 1
    assert found["llama3_slots"] == 4 and found["llama3_running"] == found["llama3_waiting"] == 0
    assert found["llama3_up"] == 1


def figures(http: httpx.Client) -> dict[str, float]:
    lines = [line for line in http.get("/metrics").text.splitlines() if line[:1] != "#"]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_the_log_has_no_prompt(
    start_server: Callable[..., RunningServer], caplog: pytest.LogCaptureFixture
) -> None:
    """Neither of requests that are answered, nor of those that are refused; unless asked for."""
    caplog.set_level(logging.DEBUG)
    secret = "xyzzy-plugh"
    bodies = [
        {"messages": [{"role": "user", "content": secret}], "max_tokens": 3},
        {"messages": [{"role": secret, "content": secret}]},
        {"messages": HELLO, secret: secret, "stop": secret, "model": secret},
        {"prompt": secret, "temperature": secret},
    ]
    for log_prompts in (False, True):
        server = start_server(log_prompts=log_prompts).wait_until_ready()
        caplog.clear()
        with server.http() as http:
            for body in bodies:
                http.post(CHAT, json=body)
            http.get(f"/v1/models/{secret}?{secret}", headers={"Authorization": secret})
        wait_for(lambda: sum(" s " in line for line in written(caplog)) == len(bodies) + 1)
        text = "\n".join(written(caplog))
        assert text.count(secret) == (10 if log_prompts else 1)  # 1: the path


def written(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of our log; each request ends with one that has its seconds."""
    return [record.getMessage() for record in caplog.records if record.name == "llama"]
