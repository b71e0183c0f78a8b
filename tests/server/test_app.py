"""app.py: the endpoints, as the official client and plain HTTP see them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from llama import Llama
from llama.engine.sampling import Sampling
from llama.server import answering
from llama.server.serve import serve
from llama.server.settings import ServerSettings
from tests.server.running import NAME, RunningServer, slowed

Start = Callable[..., RunningServer]


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == NAME and client.models.retrieve(NAME) == model


def test_stream_equals_completion(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    request = {"model": NAME, "messages": messages, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**request)  # type: ignore[call-overload]
    chunks = client.chat.completions.create(**request, stream=True)  # type: ignore[call-overload]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert whole.choices[0].message.content == text != ""
    assert whole.usage.completion_tokens == 12


def test_health_and_unknown_paths(server: RunningServer) -> None:
    with server.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/v2").json()["error"]["param"] is None
        wrong = http.get("/v1/completions")
        assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"


def test_what_models_tells(server: RunningServer) -> None:
    with server.http() as http:
        [model] = http.get("/v1/models").json()["data"]
    assert model["max_model_len"] == 512 and model["chat"] and model["dtype"] == "float32"
    draws = {"temperature": 0.6, "top_p": 0.9, "top_k": 0, "min_p": 0.0}
    assert model["defaults"] == draws | {"presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert model["quantize"] is None


def test_base_model_in_int8(start_server: Start, folder: Path, byte_tokenizer_path: Path) -> None:
    """Chat is refused, and says why; completions work."""

    def build() -> Llama:
        return Llama.build(folder, byte_tokenizer_path, 64, 1, device="cpu", quantize="int8")

    server = start_server(build, defaults=Sampling(0.0)).wait_until_ready()
    with server.http() as http:
        [model] = http.get("/v1/models").json()["data"]
        assert model["quantize"] == "int8" and model["defaults"]["temperature"] == 0
        body = {"prompt": "a", "max_tokens": 5}
        one, other = (http.post("/v1/completions", json=body).json()["choices"] for _ in range(2))
        assert one == other  # by the server's default sampling


def test_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("uvicorn", "starlette", "llguidance", "prometheus_client"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(
                ImportError, match=rf"the server needs {package}: pip install .*serve"
            ):
                serve(ServerSettings(port=0), lambda: pytest.fail("loaded"))


def test_a_stream_that_waits_gets_comments(
    server: RunningServer, tiny_llama: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first token; clients skip them."""
    monkeypatch.setattr(answering, "BEAT", 0.05)
    body = {"prompt": "word " * 60, "max_tokens": 2, "temperature": 0, "stream": True}
    with slowed(tiny_llama, 0.05, prefill_chunk=8), server.http() as http:
        text = http.post("/v1/completions", json=body).text
        chat = {"messages": [{"role": "user", "content": body.pop("prompt")}]} | body
        chunks = server.openai().chat.completions.create(model=NAME, **chat)  # type: ignore[call-overload]
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert text.startswith(": the answer is not ready yet\n\n") and text.endswith("[DONE]\n\n")


def test_headers_of_a_stream(server: RunningServer) -> None:
    """SERVER.md 2.4, 2.18."""
    body = {"prompt": "a", "max_tokens": 1, "stream": True}
    with server.http() as http:
        response = http.post("/v1/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no" and response.content.isascii()
