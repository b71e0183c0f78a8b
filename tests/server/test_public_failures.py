"""SERVER.md section 2: what goes wrong publicly. The list says where each row is tested; the rows
that have no other place are here.

- 1 generates on after a disconnect: test_slot_is_free_after_one_step
- 2 a broken pipe kills the server: test_fifty_disconnects_then_a_normal_request
- 3 an interruption corrupts the prefix cache: test_fifty_disconnects_then_a_normal_request
- 4 events read as Latin-1: test_04_events_are_ascii_and_say_utf_8, test_events_are_ascii_lines
- 5 U+FFFD in log-probabilities: test_bytes_of_logprobs_are_the_text
- 6 stop strings leak: test_stop_strings_at_every_split,
  test_stop_string_inside_a_tag_and_a_call
- 7 wrong usage: test_07_usage_is_what_the_engine_counts,
  test_07_usage_only_where_it_is_asked_for
- 8 NaN in JSON: test_08_a_model_of_nans_gives_an_error_and_no_nan, test_numbers_that_json_lacks
- 9 no log-probabilities of the prompt: test_09_echo_is_scored_as_the_model_scores,
  test_echo_scores_the_prompt
- 10 special tokens in texts: test_text_never_becomes_a_special_token,
  test_names_cannot_hold_special_tokens
- 11 tool calls lost where a delta holds several tokens: test_random_calls, test_random_text
- 12 the queue is unbounded: test_a_burst_never_passes_the_queue,
  test_a_burst_of_threads_never_passes_the_limit
- 13 no deadline for receiving: test_slow_client_is_ended
- 14 n, max_tokens, NaN unchecked: test_14_numbers_are_checked,
  test_a_wrong_chat_body_names_its_field
- 15 deep schemas compile for ever: test_15_a_deep_schema_is_refused_and_others_are_served,
  test_what_takes_long_to_read_is_refused
- 16 DNS rebinding: test_foreign_host, test_no_cors_by_default
- 17 text/plain, keys: test_content_type, test_api_key
- 18 proxies buffer, keep-alive: test_18_proxies_neither_buffer_nor_lose_connections
- 19 Ctrl-C hangs: test_running_requests_end_and_new_ones_are_refused,
  test_the_second_signal_ends_at_once
- 20 the generating thread is dead: test_the_engine_breaks
- 21 memory lost with each request: test_21_nothing_of_a_request_stays
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.engine.request import Generation
from llama.server.serve import http_server
from llama.server.settings import ServerSettings
from llama.server.ticket import Ticket
from tests.server.raw import connect, post
from tests.server.running import NAME, RunningServer, wait_for

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hi 🙂"}]


def events(text: str) -> list[dict[str, Any]]:
    """The data of a stream's events, but [DONE]."""
    *lines, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_the_list_names_tests_that_exist() -> None:
    tests = Path(__file__).parents[1]
    sources = "".join(path.read_text("utf-8") for path in tests.rglob("test_*.py"))
    names = re.findall(r"\btest_\w+", __doc__ or "")
    assert len(names) > 30
    for name in names:
        assert f"def {name}(" in sources, name


def test_04_events_are_ascii_and_say_utf_8(server: RunningServer) -> None:
    """OpenMetadata 29532."""
    body = {"messages": HELLO, "stream": True, "max_tokens": 40, "temperature": 2, "seed": 1}
    with server.http() as http:
        response = http.post(CHAT, json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.content.isascii()
    deltas = [chunk["choices"][0]["delta"] for chunk in events(response.text)]
    assert not "".join(delta.get("content", "") for delta in deltas).isascii()


def test_07_usage_is_what_the_engine_counts(server: RunningServer, tiny_llama: Llama) -> None:
    """vLLM 8625, 36379: the prompt counts once, the answers all."""
    before = tiny_llama.engine.metrics()
    body = {"messages": HELLO, "n": 3, "max_tokens": 7, "seed": 1, "ignore_eos": True}
    with server.http() as http:
        usage = http.post(CHAT, json=body).json()["usage"]
        chunks = events(
            http.post(
                CHAT, json=body | {"stream": True, "stream_options": {"include_usage": True}}
            ).text
        )
    after = tiny_llama.engine.metrics()
    prompt = len(tiny_llama.formatter.encode_dialog_prompt(HELLO))  # type: ignore[union-attr, arg-type]
    assert usage["prompt_tokens"] == prompt and usage["completion_tokens"] == 3 * 7
    assert usage["total_tokens"] == prompt + 3 * 7
    assert after.generated_tokens - before.generated_tokens == 2 * 3 * 7
    again = chunks[-1]["usage"]
    assert again.pop("prompt_tokens_details")["cached_tokens"] > 0  # of the first request
    assert again.items() <= usage.items()


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}])
def test_07_usage_only_where_it_is_asked_for(server: RunningServer, options: object) -> None:
    body = {"messages": HELLO, "max_tokens": 2, "stream": True, "stream_options": options}
    with server.http() as http:
        chunks = events(http.post(CHAT, json=body).text)
    assert all(chunk["choices"] and not chunk.get("usage") for chunk in chunks)


def test_08_a_model_of_nans_gives_an_error_and_no_nan(
    tiny_checkpoint: Callable[..., Path],
    llama3_tokenizer_path: Path,
    start_server: Callable[..., RunningServer],
) -> None:
    """vLLM 10234: where numbers overflow, the answer is still JSON, or an error that is."""
    folder = tiny_checkpoint(use_scaled_rope=True)
    weights = torch.load(folder / "consolidated.00.pth")
    weights["output.weight"] *= 1e38  # logits overflow
    torch.save(weights, folder / "consolidated.00.pth")
    llama = Llama.build(folder, llama3_tokenizer_path, 128, 2, device="cpu", dtype=torch.float32)
    server = start_server(lambda: llama).wait_until_ready()
    body = {"prompt": "a", "logprobs": 5, "echo": True, "max_tokens": 3, "temperature": 0}
    with server.http() as http:
        response = http.post(COMPLETE, json=body)
        stream = http.post(CHAT, json={"messages": HELLO, "stream": True, "max_tokens": 3})
        assert http.get("/health").status_code == 200
    assert response.status_code in (200, 500)
    for text in (response.text, stream.text):
        assert not re.search(r"\b(NaN|Infinity)\b", text)
    json.loads(response.text)


def test_09_echo_is_scored_as_the_model_scores(server: RunningServer, tiny_llama: Llama) -> None:
    """llama.cpp 27174. What lm-eval sends, and how it reads it: all but the last are the prompt's.

    Also where the one generated token ends the answer.
    """
    text = "The quick brown fox 🦊"
    ids = tiny_llama.tokenizer.encode(text, bos=True)
    scored = tiny_llama.score([text])[0]["logprobs"][-len(ids) + 1 :]
    end = str(next(iter(tiny_llama.tokenizer.stop_tokens)))
    for bias in ({}, {end: 100}):
        body = {"prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
        with server.http() as http:
            reply = http.post(COMPLETE, json=body | {"logit_bias": bias}).json()
        scores = reply["choices"][0]["logprobs"]
        assert scores["token_logprobs"][0] is None
        assert scores["token_logprobs"][1:-1] == pytest.approx(scored, abs=1e-4)
        for logprob, top in zip(
            scores["token_logprobs"][1:], scores["top_logprobs"][1:], strict=True
        ):
            assert logprob <= max(top.values())


@pytest.mark.parametrize(
    "field, value",
    [
        ("n", 10**9), ("n", 0), ("n", 10**400), ("max_tokens", -1), ("max_tokens", 2**63),
        ("temperature", 1e308), ("top_p", -0.1), ("seed", 2**64), ("top_k", 0.5),
    ],
)  # fmt: skip
def test_14_numbers_are_checked(server: RunningServer, field: str, value: float) -> None:
    """llama.cpp 19367, gpt4all 3635."""
    with server.http() as http:
        for path, body in ((CHAT, {"messages": HELLO}), (COMPLETE, {"prompt": "a"})):
            response = http.post(path, content=json.dumps(body | {field: value}),
                                 headers={"content-type": "application/json"})  # fmt: skip
            assert response.status_code == 400
            assert response.json()["error"]["param"] == field
        nan = http.post(CHAT, content=b'{"messages": [], "temperature": NaN}',
                        headers={"content-type": "application/json"})  # fmt: skip
        assert nan.status_code == 400 and "NaN" in nan.json()["error"]["message"]


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def test_15_a_deep_schema_is_refused_and_others_are_served(server: RunningServer) -> None:
    """vLLM 54003, llama.cpp 25283."""
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}
    with server.http() as http:
        for schema in (deep(40), deep(200), wide):
            schema_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            body = {"messages": HELLO, "response_format": schema_format, "max_tokens": 2}
            assert http.post(CHAT, json=body).status_code in (200, 400)
            assert http.post(COMPLETE, json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_18_proxies_neither_buffer_nor_lose_connections(server: RunningServer) -> None:
    """llama.cpp 20872, kserve 5446."""
    with server.http() as http:
        response = http.post(CHAT, json={"messages": HELLO, "stream": True, "max_tokens": 1})
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache"
    keep_alive = http_server(None, ServerSettings()).config.timeout_keep_alive  # type: ignore[arg-type]
    assert keep_alive >= 75


def test_21_nothing_of_a_request_stays(server: RunningServer) -> None:
    """ollama 18106: after 30 requests, a third of them interrupted, their objects are gone."""
    slots = 4  # each remembers the generation whose keys and values it has

    def alive() -> int:
        gc.collect()
        return sum(type(thing) in (Generation, Ticket) for thing in gc.get_objects())

    body = {"prompt": "a b c", "model": NAME, "max_tokens": 3}
    with server.http() as http:
        for number in range(30):
            if number % 3:
                assert http.post(COMPLETE, json=body | {"n": 1 + number % 2}).status_code == 200
            else:
                with connect(server) as sock:
                    sock.sendall(post(COMPLETE, body | {"max_tokens": 300, "ignore_eos": True}))
    wait_for(lambda: server.worker.running == 0)
    wait_for(lambda: alive() <= slots)
