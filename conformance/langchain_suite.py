"""LangChain's standard tests of a chat model, on `ChatOpenAI` pointed at our server."""

from __future__ import annotations

import os
from typing import Any

from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

PARAMS = {
    "model": os.environ["CONFORMANCE_MODEL"],
    "base_url": os.environ["CONFORMANCE_URL"],
    "api_key": "none",
    "max_retries": 0,
    "timeout": 300,
    "seed": 1,
    "stream_usage": True,  # off by default where the server is not OpenAI's
}


class TestUnit(ChatModelUnitTests):  # type: ignore[misc]
    @property
    def chat_model_class(self) -> Any:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return PARAMS


class TestIntegration(ChatModelIntegrationTests):  # type: ignore[misc]
    @property
    def chat_model_class(self) -> Any:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return PARAMS | {"max_tokens": 300}  # the demo model does not always come to an end

    @property
    def supports_json_mode(self) -> bool:
        return True
