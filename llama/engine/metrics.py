"""Counts of what an engine has done and has to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from llama.engine.request import FinishReason, Generation


@dataclass(frozen=True)
class EngineMetrics:
    """What an engine has done since it was made, and what it has to do.

    Every request that was queued is waiting, running or finished, and in no two of them.

    Attributes:
        waiting: requests for which no slot is left.
        running: requests that have a slot, or get one in the next step.
        slots: most requests that run at once.
        steps: steps made.
        prompt_tokens: prompt ids of the requests that got a slot, cached ones included.
        cached_tokens: those of them that were cached already.
        generated_tokens: generated ids, without stop tokens.
        proposed_tokens, accepted_tokens: ids that speculation has proposed; those of them that
            were right.
        finished: how many requests ended for each reason.
        prefill_seconds, decode_seconds: time of the steps' two parts.
    """

    waiting: int = 0
    running: int = 0
    slots: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    finished: dict[FinishReason, int] = field(default_factory=dict)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def requests(self) -> int:
        """How many requests were queued."""
        return self.waiting + self.running + sum(self.finished.values())

    def plus(self, generations: Iterable[Generation]) -> EngineMetrics:
        """Also the tokens of these, and the reasons of those that have ended."""
        prompt, cached, generated = self.prompt_tokens, self.cached_tokens, self.generated_tokens
        proposed, accepted = self.proposed_tokens, self.accepted_tokens
        finished = dict(self.finished)
        for generation in generations:
            if generation.placed_at is not None:
                prompt += len(generation.request.prompt)
                cached += generation.reused
            generated += len(generation.tokens) - len(generation.request.prompt)
            proposed += generation.proposed
            accepted += generation.accepted
            reason = generation.finish_reason
            if reason is not None:
                finished[reason] = finished.get(reason, 0) + 1
        return replace(
            self,
            prompt_tokens=prompt,
            cached_tokens=cached,
            generated_tokens=generated,
            proposed_tokens=proposed,
            accepted_tokens=accepted,
            finished=finished,
        )
