"""What a step did for a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "timeout", "cancelled", "error"]


@dataclass(frozen=True)
class Event:
    """What a step did for a request.

    Attributes:
        id: of its `Generation`.
        token: the id generated; None for a stop token or where the request ended without one.
        logprob: of `token`, if the request asked for it.
        finish_reason: None while the request goes on.
    """

    id: int
    token: int | None = None
    logprob: float | None = None
    finish_reason: FinishReason | None = None
