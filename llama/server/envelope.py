"""What surrounds the choices of a reply: its head, its usage, and how it is written as bytes."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from llama.common.version import __version__
from llama.engine.request import Request
from llama.generation import Answer, Piece
from llama.server.common_body import CommonBody

DONE = b"data: [DONE]\n\n"
Chunk = dict[str, Any]
_JSON = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def to_json(value: Any) -> bytes:
    """ASCII JSON without NaN."""
    return _JSON.encode(value).encode()


def event(chunk: Chunk) -> bytes:
    """A server-sent event."""
    return b"data: " + to_json(chunk) + b"\n\n"


class Usage:
    """Counts the tokens of a request.

    Args:
        groups: the requests, siblings together: their prompt counts once.
    """

    def __init__(self, groups: Sequence[Sequence[Request]]):
        self.prompt_tokens = sum(len(group[0].prompt) for group in groups)
        self.completion_tokens = 0
        self._answers: list[Answer | None] = [None] * len(groups)
        self._siblings = len(groups[0])

    def count(self, index: int, answer: Answer, piece: Piece) -> None:
        self.completion_tokens += len(piece.tokens)
        if index % self._siblings == 0:
            self._answers[index // self._siblings] = answer

    def as_dict(self) -> dict[str, Any]:
        cached = sum(answer.generation.reused for answer in self._answers if answer is not None)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class Envelope:
    """The fields around the choices, which are the same in all chunks of a stream."""

    def __init__(self, prefix: str, model: str, body: CommonBody, usage: Usage):
        self.head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": "",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"llama3-{__version__}",
        }
        self.body, self.usage = body, usage

    def chunk(self, kind: str, choices: list[dict[str, Any]]) -> Chunk:
        chunk = {**self.head, "object": kind, "choices": choices}
        if self.body.include_usage:
            chunk["usage"] = self.usage.as_dict() if self.body.continuous_usage else None
        return chunk

    def end(self, kind: str) -> list[Chunk]:
        """The chunk with the usage, if it was asked for."""
        if not self.body.include_usage:
            return []
        return [{**self.head, "object": kind, "choices": [], "usage": self.usage.as_dict()}]

    def whole(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.head, "object": kind, "choices": choices, "usage": self.usage.as_dict()}
