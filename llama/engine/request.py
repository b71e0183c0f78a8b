"""What is asked of the engine, and what it has generated so far: ids in, ids out."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import torch

from llama.common.errors import without_frames
from llama.engine.checks import (
    check_adapter,
    check_bias,
    check_count,
    check_prompt,
    check_seed,
    check_time_limit,
    check_top_logprobs,
)
from llama.engine.event import Event as Event
from llama.engine.event import FinishReason as FinishReason
from llama.engine.grammar import Grammar
from llama.engine.sampling import Sampling
from llama.engine.steering import Steering

log = logging.getLogger("llama")
# Fields of a request that must match on all ranks, beside the prompt.
SHARED = (
    "max_gen_len", "score_from", "stop_tokens", "logprobs", "top_logprobs", "reuse", "adapter",
)  # fmt: skip
TopLogprobs = list[tuple[int, float]]  # ids and log-probabilities, the most probable first


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
        logit_bias: added to the logits of these ids, from -100 to 100.
        top_logprobs: fill `Generation.top_logprobs` with this many ids each, at most 20; also
            `prompt_top_logprobs` if score_from is not None.
        grammar: what the answer must follow. With several ranks, rank 0's.
        time_limit: seconds after which it ends, counted from when it is queued. On one rank only.
        adapter: name of the adapter that answers; None is the base.
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
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    top_logprobs: int = 0
    grammar: Grammar | None = None
    time_limit: float | None = None
    adapter: str | None = None
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
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise TypeError(
                "grammar must have a method start(), as what json_grammar() returns, not be "
                f"{self.grammar!r}"
            )
        check_top_logprobs(self.top_logprobs)
        check_time_limit(self.time_limit)
        check_bias(self.logit_bias)
        check_prompt(self.name, self.prompt)
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise TypeError(f"adapter must be the name of an adapter, not {self.adapter!r}")
        # Copies: the caller's lists may change.
        object.__setattr__(self, "prompt", tuple(map(int, self.prompt)))
        object.__setattr__(self, "stop_tokens", frozenset(self.stop_tokens))
        bias = {int(token): float(value) for token, value in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", bias)

    @property
    def draws_globally(self) -> bool:
        """Whether it takes random numbers from torch's global generator."""
        return self.seed is None and not self.sampling.greedy

    @property
    def steered(self) -> bool:
        """Whether ids are drawn from other logits than the model's."""
        return bool(self.logit_bias) or self.grammar is not None or self.sampling.penalized

    def check(self, vocab_size: int, room: int, adapters: Sequence[str] = ()) -> None:
        """Raise a ValueError for a prompt that a model cannot run, saying what to do.

        Args:
            room: positions of a cache row.
            adapters: names of the model's adapters.
        """
        prompt, name = self.prompt, self.name
        check_adapter(self.adapter, adapters)
        if not prompt:
            raise ValueError(f"{name} is empty; give at least one token")
        if len(prompt) > room:
            raise ValueError(
                f"{name} has {len(prompt)} tokens, more than max_seq_len {room}; "
                "shorten it or build with a larger max_seq_len"
            )
        for what, ids in ((name, prompt), ("logit_bias", self.logit_bias)):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise ValueError(
                        f"{what} holds the token id {token}; ids are 0 to {vocab_size - 1}"
                    )

    def shared_fields(self) -> dict[str, Any]:
        """Fields that must match on all ranks. Sampling settings come from rank 0."""
        checksum = zlib.crc32(repr(list(self.prompt)).encode())
        fields = {name: getattr(self, name) for name in SHARED}
        fields["stop_tokens"] = sorted(int(token) for token in self.stop_tokens)
        return {"the prompt": f"{len(self.prompt)} tokens ({checksum:08x})", **fields}


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
        top_logprobs: for each generated id the most probable ids in its place, if asked for.
        prompt_top_logprobs: likewise of each prompt id, aligned with prompt_logprobs.
        reused: how many prompt ids were cached already.
        proposed, accepted: ids that speculation has proposed, and those of them that were right.
        draws_globally: as the request's of the first rank, whose sampling settings count.
        finish_reason: None while it goes on. "stop": a stop token or a stop string; "length":
            max_gen_len, or no room left; "timeout": time_limit; "cancelled"; "error": see `error`.
        stop_token, stop_score: the id that ended it; its log-probability and top_logprobs.
        error: what ended it.
        queued_at, placed_at, first_id_at, ended_at: when it was queued, got its slot, had its
            first id, and ended, in seconds of `time.monotonic`; None before.
        first: the sibling whose prompt was computed first; None for that one. See
            `Engine.queue_siblings`.
    """

    request: Request
    id: int = 0
    tokens: list[int] = field(default_factory=list)
    generated_logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    prompt_top_logprobs: list[TopLogprobs | None] = field(default_factory=list)
    reused: int = 0
    proposed: int = 0
    accepted: int = 0
    draws_globally: bool = False
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    stop_score: tuple[float, TopLogprobs] | None = None
    error: Exception | None = None
    queued_at: float | None = None
    placed_at: float | None = None
    first_id_at: float | None = None
    ended_at: float | None = None
    first: Generation | None = field(default=None, repr=False)
    generator: torch.Generator | None = field(default=None, repr=False)
    steering: Steering | None = field(default=None, repr=False)
    budget: int = 0  # most ids that it may still generate, counted from the prompt's end

    def begin(self, id: int, room: int, first: Generation | None = None) -> None:
        """Make ready to run in a cache row of `room` positions."""
        self.queued_at, self.first = monotonic(), first
        request, self.tokens = self.request, list(self.request.prompt)
        room -= len(self.tokens)
        self.budget = room if request.max_gen_len is None else min(request.max_gen_len, room)
        if request.score_from is not None:
            unscored = min(max(1, request.score_from), len(self.tokens))
            self.prompt_logprobs = [None] * unscored
            self.prompt_top_logprobs = [None] * (unscored if request.top_logprobs else 0)
        if request.seed is not None:
            self.generator = torch.Generator("cpu").manual_seed(request.seed)
        if request.steered:
            self.steering = Steering(request.sampling, request.logit_bias, request.grammar)
        self.id = id

    @property
    def ids(self) -> list[int]:
        """The generated ids, without the stop token."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def group(self) -> int:
        """The id of the first of its siblings."""
        return self.id if self.first is None else self.first.id

    @property
    def overdue(self) -> bool:
        """Whether its time is over."""
        limit = self.request.time_limit
        return limit is not None and monotonic() >= (self.queued_at or 0.0) + limit

    @property
    def own_generator(self) -> torch.Generator:
        """The generator of a request with a seed."""
        assert self.generator is not None
        return self.generator

    def append(self, token: int, logprob: float, top: TopLogprobs) -> None:
        """Add a drawn id, or end at a stop token. Does nothing if it has ended (was cancelled).

        An id is added after its log-probability: other threads, and what follows an interrupt,
        never see an id without one.
        """
        n = len(self.tokens) - len(self.request.prompt)
        if self.finish_reason is not None:
            return
        if token in self.request.stop_tokens:
            self.stop_token, self.stop_score = token, (logprob, top)
            self.end("stop")
            return
        if n < self.budget:
            if self.request.logprobs:
                self.generated_logprobs[n:] = [logprob]
            if self.request.top_logprobs:
                self.top_logprobs[n:] = [top]
            if n == 0:
                self.first_id_at = monotonic()
            self.tokens.append(token)
        if n + 1 >= self.budget:
            self.end("length")

    def add_scores(self, start: int, scores: list[float], top: list[TopLogprobs]) -> None:
        """Log-probabilities of the prompt's ids that the chunk from position `start` predicts."""
        at = max(start + 1, self.request.score_from or 0)
        if top:
            self.prompt_top_logprobs[at:] = top
        if scores:
            self.prompt_logprobs[at:] = scores

    def take_scores(self) -> bool:
        """Copy the scores of the first sibling's prompt. False if it does not have all of them."""
        n, first = len(self.request.prompt), self.first
        if first is None or len(first.prompt_logprobs) < n:
            return False
        self.prompt_top_logprobs = list(first.prompt_top_logprobs)
        self.prompt_logprobs = list(first.prompt_logprobs)
        return True

    def event(self, token: int | None = None, logprob: float = 0.0) -> Event:
        """What a step did: it generated `token`, if not None."""
        score = logprob if self.request.logprobs and token is not None else None
        return Event(self.id, token, score, self.finish_reason)

    def end(self, reason: FinishReason) -> None:
        """End it. The reason is set last: whoever sees it may read all the rest."""
        self.ended_at = monotonic()
        self.finish_reason = reason

    def fail(self, error: Exception) -> None:
        """End with an error, without harm to other requests."""
        log.debug("%s failed", self.request.name, exc_info=error)
        self.error = without_frames(error)
        self.end("error")
