"""What a refused or failed request is answered with. Knows nothing about HTTP libraries."""

from __future__ import annotations

import json
from typing import Any

from llama.common.printable import quoted as quoted

MAX_BODY = 4096  # bytes of an error's body
_MAX_MESSAGE, _MAX_NAME = 3000, 400  # bytes of JSON


class ApiError(Exception):
    """An error with the fields that OpenAI's clients read.

    Attributes:
        status: of HTTP.
        message: says what to do.
        type: "invalid_request_error", "authentication_error", "server_error", ...
        param: the field of the request that is wrong, such as "messages[0].content".
        code: for programs, such as "context_length_exceeded".
        headers: of the response, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.type = status, message, type
        self.param, self.code, self.headers = param, code, dict(headers or {})


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A 400. `param` is the field's path; an empty one is the whole body."""
    return ApiError(400, message, param=param or None, code=code)


def unavailable(message: str, code: str, seconds: int) -> ApiError:
    """A 503 that says when to try again."""
    headers = {"Retry-After": str(seconds)}
    return ApiError(503, message, type="server_error", code=code, headers=headers)


def error_object(error: ApiError) -> dict[str, Any]:
    """{"error": ...}, with bounded texts: a body, or an event of a stream that has begun."""
    return {
        "error": {
            "message": _cut(error.message, _MAX_MESSAGE),
            "type": error.type,
            "param": None if error.param is None else _cut(error.param, _MAX_NAME),
            "code": error.code,
        }
    }


def error_body(error: ApiError) -> bytes:
    """ASCII JSON of at most `MAX_BODY` bytes."""
    return json.dumps(error_object(error)).encode()


def _cut(text: str, most: int) -> str:
    """`text`, or a beginning of it that takes at most `most` bytes of ASCII JSON."""
    if len(json.dumps(text[:most])) <= most and len(text) <= most:
        return text
    return text[: most // 12 - 3] + "..."  # a character takes at most 12 bytes
