"""app.py: the endpoints, as the official client and plain HTTP see them."""

from __future__ import annotations

import openai

from tests.server.running import NAME, RunningServer


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
