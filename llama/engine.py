"""Decode loop: ids in, ids out. Knows nothing about text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from llama import parallel
from llama.model import ModelArgs, Transformer
from llama.sampling import Sampling, sample

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
    budget: int  # ids it may generate
    generator: torch.Generator | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None  # None: it goes on

    def __post_init__(self) -> None:
        if self.budget <= 0:
            self.finish_reason = "length"

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.ids)

    def take(self, token: int, logprob: float | None, stop_tokens: Collection[int]) -> None:
        """Add a drawn id, or end at a stop token."""
        if token in stop_tokens:
            self.finish_reason = "stop"
            return
        self.ids.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        if len(self.ids) >= self.budget:
            self.finish_reason = "length"


def make_rows(
    prompts: Sequence[Sequence[int]],
    max_gen_len: int,
    model: Transformer,
    seed: int | Sequence[int] | None = None,
) -> list[Row]:
    """Rows for `stream`, after checking everything that a caller can get wrong.

    Args:
        seed: of each row's own generator: one for all rows, or one a row. None: no generators.

    Raises:
        TypeError, ValueError: saying which prompt is wrong and what to do.
    """
    params = model.params
    if type(max_gen_len) is not int:
        raise TypeError(f"max_gen_len must be an integer, not {max_gen_len!r}")
    if max_gen_len < 0:
        raise ValueError(f"max_gen_len must be 0 or more, not {max_gen_len}")
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a list of lists of token ids, not {type(prompts)}")
    if not prompts:
        raise ValueError("the batch is empty; give at least one prompt")
    if len(prompts) > params.max_batch_size:
        raise ValueError(
            f"{len(prompts)} prompts are more than max_batch_size {params.max_batch_size}; "
            "build with more, or send them in several batches"
        )
    for i, prompt in enumerate(prompts):
        check_prompt(i, prompt, params)
    generators = make_generators(seed, len(prompts), model.norm.weight.device)
    return [
        Row(list(prompt), min(max_gen_len, params.max_seq_len - len(prompt)), generator)
        for prompt, generator in zip(prompts, generators, strict=True)
    ]


def make_generators(
    seed: int | Sequence[int] | None, n: int, device: torch.device
) -> list[torch.Generator | None]:
    """A generator a row, of one seed for all or of one each; None for each if `seed` is None."""
    if seed is None:
        return [None] * n
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * n
    if len(seeds) != n or not all(type(s) is int for s in seeds):
        raise TypeError(f"seed must be one integer, or one a prompt, not {seed!r}")
    return [torch.Generator(device).manual_seed(s) for s in seeds]


def check_prompt(i: int, prompt: Sequence[int], params: ModelArgs) -> None:
    """Raise a TypeError or ValueError for a prompt that the model cannot be given."""
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
        raise TypeError(f"prompt {i} must be a list of token ids, not {type(prompt)}")
    if not prompt:
        raise ValueError(f"prompt {i} is empty; give at least one token")
    if len(prompt) > params.max_seq_len:
        raise ValueError(
            f"prompt {i} has {len(prompt)} tokens, more than max_seq_len {params.max_seq_len}; "
            "shorten it or build with more"
        )
    for token in prompt:
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise TypeError(f"prompt {i} holds {token!r}, which is not a token id")
        if not 0 <= token < params.vocab_size:
            raise ValueError(
                f"prompt {i} holds the token id {token}; ids are 0 to {params.vocab_size - 1}"
            )


@torch.inference_mode()
def stream(
    model: Transformer,
    rows: Sequence[Row],
    stop_tokens: Collection[int],
    how: Sampling,
    logprobs: bool = False,
    score_prompts: bool = False,
) -> Iterator[list[Row]]:
    """Generate for a batch of prompts of any lengths, a token a row at a time.

    All prompts are prefilled in one pass. Each row then decodes at its own position until it draws
    a stop token or has used its budget; a finished row costs nothing more. Who consumes this may
    end a row early by setting its `finish_reason`.

    Args:
        model: with room in its cache for the rows.
        rows: new ones, of non-empty prompts; a prompt and its budget fit max_seq_len together.
            Either all have a generator or none has.
        logprobs: fill `Row.logprobs`.
        score_prompts: fill `Row.prompt_logprobs`.

    Yields:
        after each step the rows that took part in it.
    """
    if not score_prompts and all(row.finish_reason for row in rows):
        return
    h = prefill(model, [row.prompt for row in rows], max(r.length + r.budget for r in rows))
    if score_prompts:
        for i, row in enumerate(rows):
            row.prompt_logprobs = score_prompt(model, h[i], row.prompt)
    logits = last_logits(model, h, [len(row.prompt) for row in rows])
    del h
    keep = [i for i, row in enumerate(rows) if row.finish_reason is None]
    logits = logits.index_select(0, torch.tensor(keep, dtype=torch.long, device=logits.device))
    active = compact(model, rows, keep)  # active[i] owns row i of the cache
    while active:
        generators = [row.generator for row in active if row.generator is not None]
        drawn = parallel.broadcast(sample(logits, how, generators or None))
        scores = chosen_logprobs(logits, drawn).tolist() if logprobs else [None] * len(active)
        for row, token, score in zip(active, drawn.tolist(), scores, strict=True):
            row.take(token, score, stop_tokens)
        yield active
        keep = [i for i, row in enumerate(active) if row.finish_reason is None]
        active = compact(model, active, keep)
        if active:
            logits = decode_step(model, active)


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
