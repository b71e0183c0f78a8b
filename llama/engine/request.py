"""What is asked of the engine, and what it has generated so far: ids in, ids out."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

import torch

from llama.common.errors import without_frames
from llama.engine.sampling import Sampling

log = logging.getLogger("llama")
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it. It never changes, and may be added any number of times.

    Attributes:
        prompt: non-empty ids.
        max_gen_len: most ids to generate; None is all that fits.
        sampling: how to draw.
        seed: of the request's own generator, which makes its draws independent of other requests.
            None draws from torch's global generator.
        stop_tokens: ids that end the answer and are not part of it.
        logprobs: fill `Generation.generated_logprobs`.
        score_from: fill `Generation.prompt_logprobs` from this index of the prompt on; None fills
            nothing.
        reuse: may start from the cached beginning of an earlier prompt.
        name: what messages call it.

    Raises:
        TypeError, ValueError: a field is of another type or out of range.
    """

    prompt: Sequence[int]
    max_gen_len: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stop_tokens: Collection[int] = frozenset()
    logprobs: bool = False
    score_from: int | None = None
    reuse: bool = True
    name: str = "the prompt"

    def __post_init__(self) -> None:
        for name in ("max_gen_len", "score_from"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, check_count(name, value))
        if not isinstance(self.sampling, Sampling):
            raise TypeError(f"sampling must be a Sampling, not {self.sampling!r}")
        if not isinstance(self.stop_tokens, Collection):
            raise TypeError(f"stop_tokens must be a set of ids, not {self.stop_tokens!r}")
        if self.seed is not None:
            check_seed(self.seed)
        prompt = self.prompt
        if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
            raise TypeError(f"{self.name} must be a list of token ids, not {type(prompt)}")
        for token in prompt:
            if not isinstance(token, Integral) or isinstance(token, bool):
                raise TypeError(f"{self.name} holds {token!r}, which is not a token id")
        # Copies: the caller's lists may change.
        object.__setattr__(self, "prompt", tuple(int(token) for token in prompt))
        object.__setattr__(self, "stop_tokens", frozenset(self.stop_tokens))

    def check(self, vocab_size: int, room: int) -> None:
        """Raise a ValueError for a prompt that a model cannot run, saying what to do.

        Args:
            room: positions of a cache row.
        """
        prompt, name = self.prompt, self.name
        if not prompt:
            raise ValueError(f"{name} is empty; give at least one token")
        if len(prompt) > room:
            raise ValueError(
                f"{name} has {len(prompt)} tokens, more than max_seq_len {room}; "
                "shorten it or build with a larger max_seq_len"
            )
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"{name} holds the token id {token}; ids are 0 to {vocab_size - 1}"
                )

    def shared_fields(self) -> dict[str, Any]:
        """Fields that must match on all ranks. Sampling settings come from rank 0."""
        checksum = zlib.crc32(repr(list(self.prompt)).encode())
        return {
            "the prompt": f"{len(self.prompt)} tokens ({checksum:08x})",
            "max_gen_len": self.max_gen_len,
            "score_from": self.score_from,
            "stop_tokens": sorted(int(token) for token in self.stop_tokens),
            "logprobs": self.logprobs,
            "reuse": self.reuse,
        }


@dataclass(eq=False)
class Generation:
    """What the engine has generated for a request so far. Only the engine writes to it.

    Attributes:
        request: what was asked.
        id: its number in this engine; 0 until it is queued, and if it is refused.
        tokens: the prompt and the generated ids.
        generated_logprobs: natural log-probability of each generated id under the raw distribution
            (before temperature and top_p), if the request asks for them.
        prompt_logprobs: likewise of each prompt id; None for ids before `score_from` and for the
            first, which nothing predicts.
        reused: how many prompt ids were cached already.
        finish_reason: None while it goes on. "stop": a stop token or a stop string; "length":
            max_gen_len, or no room left; "cancelled"; "error": see `error`.
        stop_token: the id that ended it.
        error: what ended it.
    """

    request: Request
    id: int = 0
    tokens: list[int] = field(default_factory=list)
    generated_logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    reused: int = 0
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    error: Exception | None = None
    generator: torch.Generator | None = field(default=None, repr=False)
    budget: int = 0  # most ids that it may still generate, counted from the prompt's end

    def begin(self, id: int, room: int) -> None:
        """Make ready to run in a cache row of `room` positions."""
        request, self.tokens = self.request, list(self.request.prompt)
        room -= len(self.tokens)
        self.budget = room if request.max_gen_len is None else min(request.max_gen_len, room)
        if request.score_from is not None:
            self.prompt_logprobs = [None] * min(max(1, request.score_from), len(self.tokens))
        if request.seed is not None:
            self.generator = torch.Generator("cpu").manual_seed(request.seed)
        self.id = id

    @property
    def ids(self) -> list[int]:
        """The generated ids, without the stop token."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def own_generator(self) -> torch.Generator:
        """The generator of a request with a seed."""
        assert self.generator is not None
        return self.generator

    def append(self, token: int, logprob: float) -> None:
        """Add a drawn id, or end at a stop token. Does nothing if it has ended (was cancelled).

        An id is added after its log-probability: other threads, and what follows an interrupt,
        never see an id without one.
        """
        n = len(self.tokens) - len(self.request.prompt)
        if self.finish_reason is not None:
            return
        if token in self.request.stop_tokens:
            self.stop_token = token
            self.finish_reason = "stop"
            return
        if n < self.budget:
            if self.request.logprobs:
                self.generated_logprobs[n:] = [logprob]
            self.tokens.append(token)
        if n + 1 >= self.budget:
            self.finish_reason = "length"

    def add_scores(self, start: int, scores: list[float]) -> None:
        """Log-probabilities of the prompt's ids that the chunk from position `start` predicts."""
        if scores:
            self.prompt_logprobs[max(start + 1, self.request.score_from or 0) :] = scores

    def event(self, token: int | None = None, logprob: float = 0.0) -> Event:
        """What a step did: it generated `token`, if not None."""
        score = logprob if self.request.logprobs and token is not None else None
        return Event(self.id, token, score, self.finish_reason)

    def fail(self, error: Exception) -> None:
        """End with an error, without harm to other requests."""
        log.debug("%s failed", self.request.name, exc_info=error)
        self.error, self.finish_reason = without_frames(error), "error"


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


def check_seed(seed: object) -> None:
    """Raise a TypeError unless `seed` is an integer that torch's generators accept."""
    if type(seed) is not int or not -(2**63) <= seed < 2**64:
        raise TypeError(f"seed must be an integer from -2**63 to 2**64 - 1, not {seed!r}")


def check_count(name: str, value: object) -> int:
    """`value` as an int; raise a TypeError or ValueError unless it is an integer of at least 0."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, not {value}")
    return int(value)
