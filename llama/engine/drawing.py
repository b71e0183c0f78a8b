"""Draws the next ids of rows from their hidden states, and checks ids that were proposed.

Where ids were proposed, a row has several positions: after each id the next one is drawn as
without a proposal, and the row goes on as long as what is drawn is what was proposed.
Shapes: B rows, T positions a row, P positions to draw at, V vocabulary.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama.common.errors import without_frames
from llama.distributed import tensor_parallel
from llama.engine.proposal import NOTHING, Proposal, accept_or_redraw
from llama.engine.request import Generation, TopLogprobs
from llama.engine.sampling import Sampling, sample, top_logprobs, without
from llama.model import Transformer

FAILED = -1  # in the place of an id: none could be drawn


class NextId(NamedTuple):
    """What was drawn for a row.

    Attributes:
        logprob: of the id, if asked for, else 0; NaN where the logits are not finite.
        top: the most probable ids in its place, if asked for.
        error: why none could be drawn.
    """

    token: int
    logprob: float
    top: TopLogprobs
    error: Exception | None


class Place(NamedTuple):
    """Where the next ids of a generation are predicted.

    Attributes:
        first: its first position, as an index of the (B T) hidden states; after it come those of
            the proposed ids.
    """

    generation: Generation
    first: int
    proposal: Proposal = NOTHING

    @property
    def positions(self) -> range:
        return range(self.first, self.first + len(self.proposal.ids) + 1)


def draw_at(model: Transformer, h: Tensor, places: Sequence[Place]) -> dict[int, list[NextId]]:
    """What is drawn for each generation, by id: one id, and one more for each accepted proposal.

    Args:
        h: (B, T, dim) hidden states.
    """
    index = torch.tensor([at for place in places for at in place.positions], device=h.device)
    logits = model.logits(h.flatten(0, 1).index_select(0, index))  # (P, V)
    allowed = without(logits, model.unused)
    finite = allowed.amax(-1).isfinite().tolist()
    if not all(finite):  # drawing would fail, for all rows
        allowed = allowed.nan_to_num(0.0, 0.0)
    drawn = draw(places, allowed)
    starts = starts_of(places)
    rows = [start + j for start, ids in zip(starts, drawn, strict=True) for j in range(len(ids))]
    owners = [place.generation for place, ids in zip(places, drawn, strict=True) for _ in ids]
    flat = [token for ids in drawn for token in ids]
    logits = rows_of(logits, rows)
    scores = [0.0] * len(rows)
    if any(place.generation.request.logprobs for place in places):
        chosen = torch.tensor(flat, device=logits.device).clamp_min(0)
        scores = chosen_logprobs(logits, chosen).tolist()
    top = top_of_rows(owners, logits, model.unused)
    found: dict[int, list[NextId]] = {place.generation.id: [] for place in places}
    for i, (g, row, token) in enumerate(zip(owners, rows, flat, strict=True)):
        logprob = scores[i] if finite[row] else math.nan
        error = error_of(g) if token == FAILED else None
        found[g.id].append(NextId(token, logprob, top[i], error))
    return found


def starts_of(places: Sequence[Place]) -> list[int]:
    """Where each place's positions begin among those of all."""
    starts, n = [], 0
    for place in places:
        starts.append(n)
        n += len(place.positions)
    return starts


def top_of_rows(
    generations: Sequence[Generation], logits: Tensor, unused: Tensor | None
) -> list[TopLogprobs]:
    """The most probable ids of each row of (P, V) logits, as many as its generation asks for."""
    found: list[TopLogprobs] = [[] for _ in generations]
    asking = [i for i, g in enumerate(generations) if g.request.top_logprobs]
    if not asking:
        return found
    most = max(generations[i].request.top_logprobs for i in asking)
    some = logits.index_select(0, torch.tensor(asking, device=logits.device))
    for i, top in zip(asking, top_logprobs(some, unused, most), strict=True):
        found[i] = top[: generations[i].request.top_logprobs]
    return found


def error_of(generation: Generation) -> Exception:
    """Why nothing was drawn for a generation. Only the first rank knows it."""
    known = None if generation.steering is None else generation.steering.error
    return known or RuntimeError("the first rank could draw no id; its error says why")


def draw(places: Sequence[Place], logits: Tensor) -> list[list[int]]:
    """The next ids of each place, FAILED where there is none. The first rank draws for all ranks.

    Args:
        logits: (P, V) of the positions of all places.
    """
    drawn: list[list[int]] = [[] for _ in places]
    if tensor_parallel.rank() == 0:
        starts, going = starts_of(places), list(range(len(places)))
        best = logits.argmax(-1).tolist() if all(map(is_plain, places)) else None
        while going:
            rows = [starts[i] + len(drawn[i]) for i in going]
            if best is not None:
                tokens = [best[row] for row in rows]
            else:
                some = rows_of(logits, rows)
                before = [drawn[i] for i in going]
                tokens = draw_once([places[i] for i in going], before, some).tolist()
            for i, token in zip(going, tokens, strict=True):
                drawn[i].append(token)
            going = [i for i in going if goes_on(places[i], drawn[i])]
    return drawn if tensor_parallel.size() == 1 else ids_of_first_rank(places, drawn, logits.device)


def is_plain(place: Place) -> bool:
    """Whether the most probable ids are drawn, at all positions, from the model's own logits."""
    generation = place.generation
    return generation.steering is None and generation.request.sampling.greedy


def rows_of(logits: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows in ascending order; the same tensor if these are all."""
    if len(rows) == len(logits):
        return logits
    return logits.index_select(0, torch.tensor(rows, device=logits.device))


def goes_on(place: Place, drawn: Sequence[int]) -> bool:
    """Whether the last id drawn is the one that was proposed, and another may follow."""
    n, proposed = len(drawn), place.proposal.ids
    stops = place.generation.request.stop_tokens
    return n <= len(proposed) and drawn[-1] == proposed[n - 1] and drawn[-1] not in stops


def draw_once(places: Sequence[Place], before: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
    """One id a place from its row of (B, V) logits, or FAILED: (B,) int64.

    Args:
        before: the ids drawn for each place in this step.
    """
    drawn = torch.zeros(len(places), dtype=torch.long, device=logits.device)
    logits, failed = steered(places, before, logits)
    groups: dict[tuple[Sampling, bool], list[int]] = {}  # rows that can be drawn together
    for i, (place, ids) in enumerate(zip(places, before, strict=True)):
        generation, how = place.generation, place.generation.request.sampling
        proposed = place.proposal.drawn_at(len(ids))
        if proposed is not None and not how.greedy and i not in failed:
            token, q = proposed
            drawn[i] = accept_or_redraw(logits[i], how, token, q, generation.generator)
        else:
            groups.setdefault((how, generation.generator is None), []).append(i)
    for (how, unseeded), rows in groups.items():
        generators = None if unseeded else [places[i].generation.own_generator for i in rows]
        index = torch.tensor(rows, device=logits.device)
        drawn.index_copy_(0, index, sample(rows_of(logits, rows), how, generators))
    for i in failed:
        drawn[i] = FAILED
    return drawn


def steered(
    places: Sequence[Place], before: Sequence[Sequence[int]], logits: Tensor
) -> tuple[Tensor, list[int]]:
    """(logits to draw from, rows that failed); see `Steering`. Other rows are unchanged."""
    rows = [i for i, place in enumerate(places) if place.generation.steering is not None]
    if not rows:
        return logits, []
    logits, failed = logits.clone(), []
    for i in rows:
        generation = places[i].generation
        steering = generation.steering
        assert steering is not None
        try:
            tokens = [*generation.tokens, *before[i]] if before[i] else generation.tokens
            steering.apply(logits[i], tokens, len(generation.request.prompt))
        except Exception as e:  # the grammar's: the other rows go on
            steering.error = without_frames(e)
            logits[i] = 0.0  # so that the others can be drawn
            failed.append(i)
    return logits, failed


def ids_of_first_rank(
    places: Sequence[Place], drawn: Sequence[Sequence[int]], device: torch.device
) -> list[list[int]]:
    """The first rank's ids, after a check that it runs the same requests.

    Raises:
        RuntimeError: it runs others, or in another order.
    """
    state = []
    for generation, _, proposal in places:
        last = generation.tokens[-1 if generation.ids else 0 :]
        state.append((generation.id, last, proposal.ids))
    checksum = zlib.crc32(repr(state).encode())
    numbers, longest = [checksum], max(len(place.positions) for place in places)
    for ids in drawn:
        numbers += [len(ids), *ids, *[0] * (longest - len(ids))]
    sent = torch.tensor(numbers, device=device)
    other, *rows = tensor_parallel.broadcast_from_first(sent).tolist()
    if other != checksum:
        raise RuntimeError("rank 0 runs other requests: make the same calls on every rank")
    starts = range(0, len(rows), longest + 1)
    return [rows[i + 1 : i + 1 + rows[i]] for i in starts]


def chosen_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each row's id: (B, V) and (B,) -> (B,)."""
    return torch.log_softmax(logits, dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
