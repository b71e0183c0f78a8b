"""What a step computes for neighbouring rows of the cache: hidden states, scores, draws."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.distributed import tensor_parallel
from llama.engine.request import Request
from llama.engine.sampling import Sampling, sample
from llama.model import Transformer

# Prompt positions whose logits are held at once when a prompt is scored: 128 x 128,256 x 4 bytes.
SCORE_CHUNK = 128


def hidden_of_chunks(
    model: Transformer, chunks: Sequence[Sequence[int]], starts: Sequence[int], first_row: int
) -> Tensor:
    """Feed rows of the cache the next ids of each: (B, longest chunk, dim) hidden states.

    Shorter chunks are padded on the right. The padding's keys lie beyond the row's own position,
    where the causal mask hides them until they are written over.

    Args:
        starts: the position of each chunk's first id.
        first_row: of the cache.
    """
    T = max(len(chunk) for chunk in chunks)
    padded = [[*chunk, *[chunk[-1]] * (T - len(chunk))] for chunk in chunks]
    tokens = torch.tensor(padded, device=model.norm.weight.device)
    compiled = model.compiled if T == 1 and first_row == 0 else None
    if len(set(starts)) == 1 and compiled is None:
        return model.hidden(tokens, starts[0], first_row=first_row)
    start_pos = torch.tensor(starts, device=tokens.device)
    if compiled is not None:
        return compiled(tokens, start_pos, max(starts) + 1)
    return model.hidden(tokens, start_pos, max(starts) + T, first_row)


def draw_at(
    model: Transformer, h: Tensor, last: Sequence[tuple[Request, int]]
) -> dict[int, tuple[int, float]]:
    """By request id, the id drawn and its log-probability, not a number where the logits are none.

    Args:
        h: (B, T, dim) hidden states.
        last: where each request's next id is predicted, in h as (B T, dim).
    """
    requests = [request for request, _ in last]
    index = torch.tensor([at for _, at in last], device=h.device)
    logits = model.logits(h.flatten(0, 1).index_select(0, index))
    finite = logits.amax(-1).isfinite().tolist()
    if not all(finite):  # drawing would fail, and for all
        logits = logits.nan_to_num(0.0, 0.0)
    drawn = draw(requests, logits)
    scores = [0.0] * len(requests)
    if any(request.logprobs for request in requests):
        scores = chosen_logprobs(logits, drawn).tolist()
    rows = zip(requests, drawn.tolist(), scores, finite, strict=True)
    return {r.id: (token, score if known else math.nan) for r, token, score, known in rows}


def draw(requests: Sequence[Request], logits: Tensor) -> Tensor:
    """One id a request, (B, V) -> (B,): the first rank draws for all."""
    groups: dict[tuple[Sampling, bool], list[int]] = {}  # rows that can be drawn together
    for i, request in enumerate(requests if tensor_parallel.rank() == 0 else ()):
        groups.setdefault((request.sampling, request.generator is None), []).append(i)
    drawn = torch.zeros(len(requests), dtype=torch.long, device=logits.device)
    for (how, unseeded), rows in groups.items():
        generators = None if unseeded else [requests[i].own_generator for i in rows]
        index = torch.tensor(rows, device=logits.device)
        some = logits if len(groups) == 1 else logits.index_select(0, index)
        drawn.index_copy_(0, index, sample(some, how, generators))
    return drawn if tensor_parallel.size() == 1 else _of_first_rank(requests, drawn)


def _of_first_rank(requests: Sequence[Request], drawn: Tensor) -> Tensor:
    """The first rank's ids, with a check that it was asked the same.

    Raises:
        RuntimeError: it was not, or not in the same order.
    """
    known = [(r.id, r.tokens[-1 if r.ids else 0 :]) for r in requests]
    mark = zlib.crc32(repr(known).encode())
    *ids, other = tensor_parallel.broadcast_from_first(F.pad(drawn, (0, 1), value=mark)).tolist()
    if other != mark:
        raise RuntimeError("rank 0 was asked something else: make the same calls on every rank")
    return drawn.new_tensor(ids)


def chosen_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each row's id: (B, V) and (B,) -> (B,)."""
    return torch.log_softmax(logits, dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def score_prompt(
    model: Transformer, request: Request, hidden: Tensor, start: int, length: int
) -> list[float]:
    """Log-probabilities of the prompt's ids that a chunk predicts, a slice of logits at a time.

    Args:
        hidden: (T, dim) normed hidden states of a chunk.
        start: its position.
        length: how much of it is not padding.
    """
    if request.score_from is None:
        return []
    scores: list[float] = []
    end = min(start + length + 1, len(request.prompt))
    for at in range(max(start + 1, request.score_from), end, SCORE_CHUNK):
        chosen = request.tokens[at : min(at + SCORE_CHUNK, end)]
        logits = model.logits(hidden.narrow(0, at - 1 - start, len(chosen)))
        index = torch.tensor(chosen, device=hidden.device)
        scores += chosen_logprobs(logits, index).tolist()
    return scores
