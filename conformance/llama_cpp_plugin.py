"""Pytest plugin: lets llama.cpp's server tests talk to a server that they did not start.

Their requests go to paths without `/v1` and name no model or any, which llama.cpp permits. The
models that the tests would download are not needed. Nothing of what they check is changed.
"""

from __future__ import annotations

import os
from typing import Any

import utils  # llama.cpp's
from openai.resources.chat.completions import Completions as Chat
from openai.resources.completions import Completions

UNDER_V1 = ("/chat/completions", "/completions", "/models")

make_url = utils.ServerProcess.make_url
make_request = utils.ServerProcess.make_request
make_stream_request = utils.ServerProcess.make_stream_request


def url_under_v1(self: Any, path: str, host: str | None = None) -> str:
    return str(make_url(self, f"/v1{path}" if path in UNDER_V1 else path, host))


def with_model(data: Any) -> Any:
    if isinstance(data, dict) and data.get("model") is None:
        return data | {"model": os.environ["CONFORMANCE_MODEL"]}
    return data


def request_with_model(
    self: Any, method: str, path: str, data: Any = None, *args: Any, **kwargs: Any
) -> Any:
    return make_request(self, method, path, with_model(data), *args, **kwargs)


def stream_with_model(
    self: Any, method: str, path: str, data: Any = None, *args: Any, **kwargs: Any
) -> Any:
    return make_stream_request(self, method, path, with_model(data), *args, **kwargs)


utils.ServerProcess.make_url = url_under_v1
utils.ServerProcess.make_request = request_with_model
utils.ServerProcess.make_stream_request = stream_with_model
utils.ServerPreset.load_all = staticmethod(lambda: None)


def name_the_model(resource: Any) -> None:
    """Let the openai client ask for the model that is served."""
    create = resource.create

    def create_with_model(self: Any, **fields: Any) -> Any:
        return create(self, **fields | {"model": os.environ["CONFORMANCE_MODEL"]})

    resource.create = create_with_model


name_the_model(Chat)
name_the_model(Completions)
