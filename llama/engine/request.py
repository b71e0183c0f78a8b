"""What is asked of the engine and what has come of it: one prompt of ids, one answer of ids."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

import torch

from llama.engine.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(eq=False)
class Request:
    """One prompt, and what has been generated for it.

    Attributes:
        prompt: non-empty ids.
        max_gen_len: most ids to generate; None is all that fits.
        sampling: how to draw.
        seed: of the request's own generator, which makes its draws independent of other requests.
            None draws from torch's global generator.
        stop_tokens: ids that end the answer and are not part of it.
        logprobs: fill `generated_logprobs`.
        score_from: fill `prompt_logprobs` from this index of the prompt on; None is not at all.
        reuse: may begin where a cached prompt with the same beginning ends.
        watch: called after each of the request's steps; may end it by setting `finish_reason`.
        name: in messages.

    The answer, filled by the engine:
        id: a number of its own in this engine.
        tokens: the prompt and the generated ids.
        generated_logprobs: natural logarithms of the raw distribution (before temperature and
            top_p), one per generated id.
        prompt_logprobs: likewise, one per prompt id; None for those not asked for and for the
            first, which nothing predicted.
        reused: how many prompt ids were in the cache already.
        finish_reason: None while it goes on. "stop": a stop token, or `watch`; "length":
            max_gen_len, or no room left; "cancelled"; "error": see `error`.
        stop_token: the one that ended it.
    """

    prompt: Sequence[int]
    max_gen_len: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stop_tokens: Collection[int] = frozenset()
    logprobs: bool = False
    score_from: int | None = None
    reuse: bool = True
    watch: Callable[[], object] | None = None
    name: str = "the prompt"

    id: int = field(init=False, default=0)
    tokens: list[int] = field(init=False, default_factory=list)
    generated_logprobs: list[float] = field(init=False, default_factory=list)
    prompt_logprobs: list[float | None] = field(init=False, default_factory=list)
    reused: int = field(init=False, default=0)
    finish_reason: FinishReason | None = field(init=False, default=None)
    stop_token: int | None = field(init=False, default=None)
    error: Exception | None = field(init=False, default=None)
    generator: torch.Generator | None = field(init=False, default=None)
    budget: int = field(init=False, default=0)  # ids it may generate

    @property
    def ids(self) -> list[int]:
        """What has been generated, without the stop token."""
        return self.tokens[len(self.prompt) :]

    @property
    def own_generator(self) -> torch.Generator:
        """That of a request with a seed."""
        assert self.generator is not None
        return self.generator

    def check(self, vocab_size: int, room: int) -> None:
        """Raise a TypeError or ValueError for what the engine cannot run, saying what to do."""
        for name in ("max_gen_len", "score_from"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
                raise TypeError(f"{name} must be an integer, not {value!r}")
            if value is not None and int(value) < 0:
                raise ValueError(f"{name} must be 0 or more, not {value}")
        if not isinstance(self.sampling, Sampling):
            raise TypeError(f"sampling must be a Sampling, not {self.sampling!r}")
        if not isinstance(self.stop_tokens, Collection):
            raise TypeError(f"stop_tokens must be a set of ids, not {self.stop_tokens!r}")
        if self.seed is not None:
            check_seed(self.seed)
        prompt, name = self.prompt, self.name
        if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
            raise TypeError(f"{name} must be a list of token ids, not {type(prompt)}")
        if not prompt:
            raise ValueError(f"{name} is empty; give at least one token")
        if len(prompt) > room:
            raise ValueError(
                f"{name} has {len(prompt)} tokens, more than max_seq_len {room}; "
                "shorten it or build with more"
            )
        for token in prompt:
            if not isinstance(token, Integral) or isinstance(token, bool):
                raise TypeError(f"{name} holds {token!r}, which is not a token id")
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"{name} holds the token id {token}; ids are 0 to {vocab_size - 1}"
                )

    def facts(self) -> dict[str, Any]:
        """What several ranks must ask alike, else they wait for each other; how, the first says."""
        content = zlib.crc32(repr([int(token) for token in self.prompt]).encode())
        return {
            "the prompt": f"{len(self.prompt)} tokens ({content:08x})",
            "max_gen_len": None if self.max_gen_len is None else int(self.max_gen_len),
            "score_from": None if self.score_from is None else int(self.score_from),
            "stop_tokens": sorted(int(token) for token in self.stop_tokens),
            "logprobs": self.logprobs,
            "reuse": self.reuse,
        }

    def begin(self, room: int, device: torch.device) -> None:
        """Make ready to run in a cache row of `room` positions."""
        if self.tokens or self.finish_reason:
            raise ValueError("a request runs once; make another")
        self.prompt = [int(token) for token in self.prompt]  # the caller's list may change
        self.stop_tokens = frozenset(self.stop_tokens)
        self.tokens = list(self.prompt)
        room -= len(self.tokens)
        self.budget = room if self.max_gen_len is None else min(int(self.max_gen_len), room)
        if self.score_from is not None:
            self.prompt_logprobs = [None] * min(max(1, self.score_from), len(self.tokens))
        if self.seed is not None:
            self.generator = torch.Generator(device).manual_seed(self.seed)

    def take(self, token: int, logprob: float) -> None:
        """Add a drawn id, or end at a stop token; nothing if it has ended (was cancelled)."""
        if self.finish_reason is not None:
            return
        if token in self.stop_tokens:
            self.stop_token = token
            self.finish_reason = "stop"
            return
        self.tokens.append(token)
        if self.logprobs:
            self.generated_logprobs.append(logprob)
        if len(self.tokens) - len(self.prompt) >= self.budget:
            self.finish_reason = "length"

    def fail(self, error: Exception) -> None:
        """End without harm to other requests."""
        self.error, self.finish_reason = error, "error"


def check_seed(seed: object) -> None:
    """Raise a TypeError unless it is an integer that torch's generators take."""
    if type(seed) is not int or not -(2**63) <= seed < 2**64:
        raise TypeError(f"seed must be an integer of 64 bits, not {seed!r}")
