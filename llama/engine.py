"""Decode loop: ids in, ids out. Knows nothing about text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llama import parallel
from llama.model import Transformer
from llama.sampling import sample

FinishReason = Literal["stop", "length"]
# Prompt positions whose logits are held at once when a prompt is scored: 128 x 128,256 x 4 bytes.
SCORE_CHUNK = 128


@dataclass
class Row:
    """One prompt and what has been generated for it.

    `logprobs` are natural logarithms of the raw distribution (before temperature and top_p), one
    per generated id; `prompt_logprobs` likewise per prompt id, None for the first, which nothing
    predicted. The stop token that ended a row is in neither list.
    """

    prompt: list[int]
    budget: int  # ids it may still generate
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    finish_reason: FinishReason = "length"

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.ids)

    def take(self, token: int, stop_tokens: Collection[int]) -> bool:
        """Add a drawn id; whether the row goes on."""
        if token in stop_tokens:
            self.finish_reason = "stop"
            return False
        self.ids.append(token)
        return len(self.ids) < self.budget


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_gen_len: int,
    stop_tokens: Collection[int],
    temperature: float = 0.6,
    top_p: float = 0.9,
    logprobs: bool = False,
    score_prompts: bool = False,
) -> list[Row]:
    """Generate for a batch of prompts of any lengths.

    All prompts are prefilled in one pass. Each row then decodes at its own position until it draws
    a stop token or has used its own budget, the smaller of `max_gen_len` and what max_seq_len
    leaves; a finished row costs nothing more.

    Args:
        model: with room in its cache for the rows.
        prompts: non-empty lists of ids, none longer than max_seq_len.
        logprobs: fill `Row.logprobs`.
        score_prompts: fill `Row.prompt_logprobs`.
    """
    room = model.params.max_seq_len
    rows = [Row(list(p), min(max_gen_len, room - len(p))) for p in prompts]
    if max_gen_len == 0 and not score_prompts:
        return rows
    h = prefill(model, [row.prompt for row in rows], max(r.length + r.budget for r in rows))
    if score_prompts:
        for i, row in enumerate(rows):
            row.prompt_logprobs = score_prompt(model, h[i], row.prompt)
    logits = last_logits(model, h, [len(row.prompt) for row in rows])
    del h
    keep = [i for i, row in enumerate(rows) if row.budget > 0]
    active = compact(model, rows, keep)  # active[i] owns row i of the cache
    logits = logits.index_select(0, torch.tensor(keep, dtype=torch.long, device=logits.device))
    while active:
        drawn = parallel.broadcast(sample(logits, temperature, top_p))
        scores = chosen_logprobs(logits, drawn).tolist() if logprobs else []
        keep = [i for i, t in enumerate(drawn.tolist()) if active[i].take(t, stop_tokens)]
        for row, score_ in zip(active, scores, strict=False):
            row.logprobs.append(score_)
        active = compact(model, active, keep)
        if active:
            logits = decode_step(model, active)
    for row in rows:
        del row.logprobs[len(row.ids) :]  # the stop token's
    return rows


def prefill(model: Transformer, prompts: Sequence[Sequence[int]], furthest: int) -> Tensor:
    """Fill cache rows 0, 1, ... with whole prompts; (B, longest prompt, dim) hidden states.

    Shorter prompts are padded on the right. The padding's keys lie beyond the row's own position,
    where the causal mask hides them until decoding overwrites them.

    Args:
        furthest: how far any row may get. Rows of different lengths read up to each other's
            position, where an earlier call may have left what is not finite.
    """
    lengths = [len(p) for p in prompts]
    padded = [list(p) + [0] * (max(lengths) - len(p)) for p in prompts]
    device = model.norm.weight.device
    h = model.hidden(torch.tensor(padded, device=device), 0)
    if len(set(lengths)) > 1:
        model.clear_cache(len(prompts), max(lengths), furthest)
    return h


def last_logits(model: Transformer, h: Tensor, lengths: Sequence[int]) -> Tensor:
    """Logits after the last of each row's `lengths`: (B, T, dim) -> (B, V)."""
    last = [i * h.shape[1] + n - 1 for i, n in enumerate(lengths)]
    return model.logits(h.flatten(0, 1).index_select(0, torch.tensor(last, device=h.device)))


def decode_step(model: Transformer, active: Sequence[Row]) -> Tensor:
    """Feed each row's last id at its own position -> logits of the next ids, (B, V)."""
    tokens = torch.tensor([[row.ids[-1]] for row in active], device=model.norm.weight.device)
    positions = [row.length - 1 for row in active]
    if len(set(positions)) == 1:
        h = model.hidden(tokens, positions[0])
    else:
        start_pos = torch.tensor(positions, device=tokens.device)
        h = model.hidden(tokens, start_pos, cache_len=max(positions) + 1)
    return model.logits(h.select(1, -1))


def compact(model: Transformer, active: Sequence[Row], keep: Sequence[int]) -> list[Row]:
    """Let the rows at `keep` (rising) own the first cache rows, in that order."""
    longest = max((active[i].length for i in keep), default=0)  # how far rows read
    for target, source in enumerate(keep):
        if source != target:
            model.move_row(source, target, longest)
    return [active[i] for i in keep]


def chosen_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each row's id: (B, V) and (B,) -> (B,)."""
    return torch.log_softmax(logits, dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def score_prompt(model: Transformer, hidden: Tensor, prompt: Sequence[int]) -> list[float | None]:
    """Log-probability of each prompt id given those before it, a slice of logits at a time.

    Args:
        hidden: (at least len(prompt), dim) normed hidden states of the row.
    """
    scores: list[float | None] = [None]
    targets = torch.tensor(prompt[1:], device=hidden.device)
    for at in range(0, len(targets), SCORE_CHUNK):
        chosen = targets[at : at + SCORE_CHUNK]
        scores += chosen_logprobs(model.logits(hidden[at : at + len(chosen)]), chosen).tolist()
    return scores
