"""A client that goes away, at any moment, costs nobody else anything."""

from __future__ import annotations

import json
import logging
import random
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from llama import Llama
from tests.server.raw import connect, post, read_all
from tests.server.running import RunningServer, generations, slowed, wait_for

COMPLETE = "/v1/completions"
LONG = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "temperature": 0}


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("phase", ["prefill", "decode", "queue"])
def test_slot_is_free_after_one_step(
    server: RunningServer, tiny_llama: Llama, phase: str, stream: bool
) -> None:
    """SERVER.md 2.1."""
    engine = tiny_llama.engine
    before = 4 if phase == "queue" else 0
    body = LONG | {"stream": stream}
    if phase == "prefill":
        body["prompt"] = "word " * 300
    with slowed(tiny_llama, 0.02, prefill_chunk=8):
        others = [connect(server) for _ in range(before)]
        for sock in others:
            sock.sendall(post(COMPLETE, LONG))
        wait_for(lambda: len(generations(server)) == before)
        client = connect(server)
        client.sendall(post(COMPLETE, body))
        wait_for(lambda: len(generations(server)) == before + 1)
        generation = max(generations(server), key=lambda generation: generation.id)
        if phase == "decode":
            wait_for(lambda: len(generation.ids) > 2)
        client.close()
        wait_for(lambda: generation.finish_reason is not None)
        steps = engine.steps
        for sock in others:
            sock.close()
        wait_for(lambda: not engine.busy)
        assert engine.steps <= steps + 1 + before
    assert generation.finish_reason == "cancelled"
    wait_for(lambda: all(slot.generation is None for slot in engine._slots.rows))
    assert phase == "decode" or generation.ids == []


def test_fifty_disconnects_then_a_normal_request(server: RunningServer, tiny_llama: Llama) -> None:
    """SERVER.md 2.2, 2.3: the interrupted request, sent again, equals the uncached answer."""
    generator = random.Random(0)
    prompts = ["The quick brown fox jumps over the lazy dog. " * n for n in (1, 3, 9)]
    for _ in range(50):
        body = LONG | {"prompt": generator.choice(prompts), "stream": generator.random() < 0.5}
        data = post(COMPLETE, body | {"n": generator.choice((1, 1, 3))})
        with connect(server) as sock:
            sock.sendall(data[: generator.choice((len(data), len(data), 10, 100))])
            time.sleep(generator.choice((0, 0.01, 0.05)))
            if generator.random() < 0.3:  # a reset in place of an orderly end
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    wait_for(lambda: not tiny_llama.engine.busy)
    with server.http() as http:
        for prompt in prompts:
            body = {"prompt": prompt, "max_tokens": 16, "temperature": 0}
            answer = http.post(COMPLETE, json=body).json()["choices"][0]["text"]
            [oracle] = tiny_llama.text_completion([prompt], temperature=0, max_gen_len=16)
            assert answer == oracle["generation"]
    assert server.worker.running == 0


def test_the_log_says_who_went_away(
    server: RunningServer, tiny_llama: Llama, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with slowed(tiny_llama, 0.02), connect(server) as sock:
        sock.sendall(post(COMPLETE, LONG))
        wait_for(lambda: generations(server))
    wait_for(lambda: any(COMPLETE in record.getMessage() for record in caplog.records))
    assert f"POST {COMPLETE} 499 " in caplog.text


def test_slow_reader_holds_up_nobody(server: RunningServer, tiny_llama: Llama) -> None:
    """It gets longer pieces later; together they are the answer."""
    body: dict[str, Any] = LONG | {"stream": True, "n": 2, "max_tokens": 40, "logprobs": 5}
    with connect(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(post(COMPLETE, body, "Connection: close"))
        wait_for(lambda: tiny_llama.engine.busy)
        with server.http() as http:
            assert http.post(COMPLETE, json=LONG | {"max_tokens": 5}).status_code == 200
            wait_for(lambda: not tiny_llama.engine.busy)  # nobody has read the first one yet
            whole = http.post(COMPLETE, json=body | {"stream": False}).json()
        events = [line[6:] for line in read_all(sock).split(b"\n") if line[:6] == b"data: "]
    assert events.pop() == b"[DONE]"
    texts = ["", ""]
    for event in events:
        [choice] = json.loads(event)["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole["choices"]]


def test_a_client_that_takes_nothing_is_disconnected(
    start_server: Callable[..., RunningServer],
) -> None:
    """After the time that an answer may take; what it is sent is not kept for ever."""
    server = start_server(request_timeout=0.5).wait_until_ready()
    with connect(server) as sock:
        get = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        sock.sendall(get * 2000)
        wait_for(lambda: server.server.server_state.connections)
        wait_for(lambda: not server.server.server_state.connections)
