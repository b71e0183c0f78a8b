"""Bodies that nobody would send: each gets an answer that the OpenAPI document describes, never a
5xx, and the server is well after each.
"""

from __future__ import annotations

import http.client
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.bodies import Maker, damage, encoded
from tests.server.running import RunningServer

BODIES = {
    "/v1/chat/completions": "ChatBody",
    "/v1/completions": "CompletionBody",
    "/tokenize": "TokenizeBody",
    "/detokenize": "DetokenizeBody",
}


class Caller:
    """Sends bodies over one connection and checks every answer against the document."""

    def __init__(self, connection: http.client.HTTPConnection):
        self.connection = connection
        self.document = json.loads(self._exchange("GET", "/openapi.json", None)[2])
        self.operations = {path: self.document["paths"][path]["post"] for path in BODIES}
        self._validators: dict[str, jsonschema.protocols.Validator] = {}

    def post(self, path: str, body: bytes) -> int:
        """The status. The body of the answer fits the schema of its status."""
        status, kind, answer = self._exchange("POST", path, body)
        assert status < 500, answer
        content = self.operations[path]["responses"][str(status)]["content"]
        schema = content[kind.split(";")[0]]["schema"]
        if kind != "application/json":
            assert kind == "text/event-stream; charset=utf-8"
            *events, end = answer.decode("ascii").removesuffix("\n\n").split("\n\n")
            assert end == "data: [DONE]" and events
            for event in events:
                data = event.removeprefix("data: ")
                self.check(schema["properties"]["data"]["contentSchema"], json.loads(data))
        else:
            self.check(schema, json.loads(answer))
        if status == 200:  # what the server takes, its document permits
            request = self.operations[path]["requestBody"]["content"]["application/json"]
            self.check(request["schema"], json.loads(body))
        health, _, _ = self._exchange("GET", "/health", None)
        assert health == 200
        return status

    def check(self, schema: dict[str, Any], value: Any) -> None:
        key = json.dumps(schema)
        if key not in self._validators:
            whole = schema | {"components": self.document["components"]}
            self._validators[key] = jsonschema.Draft202012Validator(whole)
        self._validators[key].validate(value)

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int, str, bytes]:
        self.connection.request(method, path, body, {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read()


@pytest.fixture(scope="module")
def caller(server: RunningServer) -> Iterator[Caller]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)  # no hang
    yield Caller(connection)
    connection.close()


def test_2000_bodies_of_the_openapi_document(caller: Caller) -> None:
    maker = Maker(caller.document, seed=0)
    seen: Counter[tuple[bool, int]] = Counter()
    paths = [*BODIES, "/v1/chat/completions", "/v1/completions"]
    for number in range(2000):
        path, altered = paths[number % len(paths)], number % 4 != 0
        body = encoded(maker.body(BODIES[path], altered))
        if number % 40 == 1:
            body = damage(body, maker.random)
        status = caller.post(path, body)
        assert status in (200, 400, 404), body
        seen[altered, status] += 1
    # The bodies reach the model, and the checks.
    assert seen[False, 200] > 100 and seen[True, 200] > 100 and seen[True, 400] > 500, seen


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)
names = ["messages", "prompt", "stop", "tools", "tool_choice", "response_format", "logit_bias",
         "n", "seed", "stream", "stream_options", "top_k", "logprobs", "content", "tokens",
         "temperature", "echo", "continue_ids", "model"]  # fmt: skip


@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    path=st.sampled_from([*BODIES]),
    body=values | st.dictionaries(st.sampled_from(names), values),
)
def test_500_json_values_by_hypothesis(caller: Caller, path: str, body: Any) -> None:
    if isinstance(body, dict):
        body["max_tokens"] = 2
    assert caller.post(path, encoded(body)) in (200, 400, 404)
