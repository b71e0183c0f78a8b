"""What a step computes for neighbouring rows of the cache: hidden states, scores, drawn ids."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.common.errors import without_frames
from llama.distributed import tensor_parallel
from llama.engine.compiled_step import CompiledStep
from llama.engine.drawing_step import Row, draw_rows
from llama.engine.forks import check_not_forked
from llama.engine.request import Generation, TopLogprobs
from llama.engine.sampling import Sampling, sample, top_logprobs, without
from llama.layers.adapter_rows import selected
from llama.model import KVCache, Transformer

# Prompt positions whose logits are held at once when a prompt is scored: 128 x 128,256 x 4 bytes.
SCORE_CHUNK = 128
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


class Scores(NamedTuple):
    """Log-probabilities of the prompt's ids that a chunk predicts; empty if not asked for."""

    logprobs: list[float]
    top: list[TopLogprobs]


class Chunk(NamedTuple):
    """The ids that a step feeds one row.

    Attributes:
        start: the position of the first of them.
        whole: they are all that was pending, so that the next id can be drawn.
    """

    generation: Generation
    start: int
    ids: list[int]
    whole: bool

    @staticmethod
    def pending(generation: Generation, start: int, most: int) -> Chunk:
        """At most `most` of a generation's ids from position `start` on."""
        ids = generation.tokens[start : start + most]
        return Chunk(generation, start, ids, start + len(ids) == len(generation.tokens))


def compute(
    model: Transformer,
    cache: Sequence[KVCache],
    chunks: Sequence[Chunk],
    first_row: int,
    compiled: CompiledStep | None = None,
) -> tuple[int, list[Scores], dict[int, NextId]]:
    """Feed neighbouring rows, score their prompts, and draw where a chunk is whole.

    Args:
        first_row: the cache row of the first chunk.
        compiled: used if every chunk is one id and first_row is 0; None: never.

    Returns:
        (positions written in each row, scores of each row's prompt ids, `draw_at`).

    Raises:
        RuntimeError: the model was moved since its cache was made; or see `check_not_forked`.
    """
    w, k = model.norm.weight, cache[0].k
    check_not_forked(w.device)
    if (w.dtype, w.device) != (k.dtype, k.device):
        raise RuntimeError(
            f"the model has been moved to {w.dtype} on {w.device}, and its cache is {k.dtype} on "
            f"{k.device}; build it as you need it, or make another Llama(model, tokenizer) of it"
        )
    graphed = compiled is not None and compiled.graphed and tensor_parallel.size() == 1
    if compiled is not None and graphed and first_row == 0 and all(map(decodes, chunks)):
        return 1, [Scores([], []) for _ in chunks], drawn_by_graph(compiled, chunks)
    ids, starts = [chunk.ids for chunk in chunks], [chunk.start for chunk in chunks]
    with selected(model, [chunk.generation.request.adapter for chunk in chunks]):
        h = hidden_of_chunks(model, cache, ids, starts, first_row, compiled)
    width = h.shape[1]
    scores = [
        score_prompt(model, chunk.generation, h[i], chunk.start, len(chunk.ids))
        for i, chunk in enumerate(chunks)
    ]
    last = [  # where in `h` the next ids are predicted
        (chunk.generation, i * width + len(chunk.ids) - 1)
        for i, chunk in enumerate(chunks)
        if chunk.whole and chunk.generation.budget > 0
    ]
    return width, scores, draw_at(model, h, last) if last else {}


def decodes(chunk: Chunk) -> bool:
    """Whether the chunk is one id, from which the next is drawn plainly, and nothing is scored."""
    generation, request = chunk.generation, chunk.generation.request
    if generation.steering is not None or request.top_logprobs:
        return False
    scored = request.score_from is not None and chunk.start < len(request.prompt)
    return chunk.whole and len(chunk.ids) == 1 and generation.budget > 0 and not scored


def drawn_by_graph(compiled: CompiledStep, chunks: Sequence[Chunk]) -> dict[int, NextId]:
    """As `draw_at`, for chunks that `decodes`."""
    rows = []
    for generation, start, ids, _ in chunks:
        rows.append(Row(ids[0], start, generation.request.sampling, generation.generator))
    drawn = {}
    for (generation, *_), found in zip(chunks, draw_rows(compiled, rows), strict=True):
        logprob = found.logprob if generation.request.logprobs else 0.0
        drawn[generation.id] = NextId(found.token, logprob if found.finite else math.nan, [], None)
    return drawn


def hidden_of_chunks(
    model: Transformer,
    cache: Sequence[KVCache],
    chunks: Sequence[Sequence[int]],
    starts: Sequence[int],
    first_row: int,
    compiled: CompiledStep | None = None,
) -> Tensor:
    """Feed rows of the cache the next ids of each: (B, longest chunk, dim) hidden states.

    Shorter chunks are padded on the right. The padding's keys are beyond the row's own position,
    where the causal mask hides them until they are overwritten.

    Args:
        starts: the position of each chunk's first id.
        first_row: the cache row of the first chunk.
        compiled: used if every chunk is one id and first_row is 0; None: never.
    """
    T = max(len(chunk) for chunk in chunks)
    padded = [[*chunk, *[chunk[-1]] * (T - len(chunk))] for chunk in chunks]
    tokens = torch.tensor(padded, device=model.norm.weight.device)
    if T == 1 and first_row == 0 and compiled is not None:
        start_pos = torch.tensor(starts, device=tokens.device)
        return compiled(tokens, start_pos, max(starts) + 1)
    if len(set(starts)) == 1:
        return model.hidden(tokens, starts[0], cache, first_row=first_row)
    start_pos = torch.tensor(starts, device=tokens.device)
    return model.hidden(tokens, start_pos, cache, max(starts) + T, first_row)


def draw_at(
    model: Transformer, h: Tensor, last: Sequence[tuple[Generation, int]]
) -> dict[int, NextId]:
    """What is drawn for each generation, by id.

    Args:
        h: (B, T, dim) hidden states.
        last: where each generation's next id is predicted, as an index into (B T, dim).
    """
    generations = [generation for generation, _ in last]
    index = torch.tensor([at for _, at in last], device=h.device)
    logits = model.logits(h.flatten(0, 1).index_select(0, index))
    allowed = without(logits, model.unused)
    finite = allowed.amax(-1).isfinite().tolist()
    if not all(finite):  # drawing would fail, for all rows
        allowed = allowed.nan_to_num(0.0, 0.0)
    drawn = draw(generations, allowed)
    scores = [0.0] * len(generations)
    if any(generation.request.logprobs for generation in generations):
        scores = chosen_logprobs(logits, drawn.clamp_min(0)).tolist()
    top = top_of_rows(generations, logits, model.unused)
    found = {}
    for i, (g, token) in enumerate(zip(generations, drawn.tolist(), strict=True)):
        logprob = scores[i] if finite[i] else math.nan
        error = error_of(g) if token == FAILED else None
        found[g.id] = NextId(token, logprob, top.get(g.id, []), error)
    return found


def top_of_rows(
    generations: Sequence[Generation], logits: Tensor, unused: Tensor | None
) -> dict[int, TopLogprobs]:
    """The most probable ids for the generations that ask for them, by id."""
    asking = [i for i, g in enumerate(generations) if g.request.top_logprobs]
    if not asking:
        return {}
    most = max(generations[i].request.top_logprobs for i in asking)
    some = logits.index_select(0, torch.tensor(asking, device=logits.device))
    rows = zip(asking, top_logprobs(some, unused, most), strict=True)
    return {generations[i].id: top[: generations[i].request.top_logprobs] for i, top in rows}


def error_of(generation: Generation) -> Exception:
    """Why nothing was drawn for a generation. Only the first rank knows it."""
    known = None if generation.steering is None else generation.steering.error
    return known or RuntimeError("the first rank could draw no id; its error says why")


def draw(generations: Sequence[Generation], logits: Tensor) -> Tensor:
    """One id a generation, (B, V) -> (B,), or FAILED. The first rank draws for all ranks."""
    drawn = torch.zeros(len(generations), dtype=torch.long, device=logits.device)
    if tensor_parallel.rank() == 0:
        logits, failed = steered(generations, logits)
        groups: dict[tuple[Sampling, bool], list[int]] = {}  # rows that can be drawn together
        for i, g in enumerate(generations):
            groups.setdefault((g.request.sampling, g.generator is None), []).append(i)
        for (how, unseeded), rows in groups.items():
            generators = None if unseeded else [generations[i].own_generator for i in rows]
            index = torch.tensor(rows, device=logits.device)
            some = logits if len(groups) == 1 else logits.index_select(0, index)
            drawn.index_copy_(0, index, sample(some, how, generators))
        for i in failed:
            drawn[i] = FAILED
    return drawn if tensor_parallel.size() == 1 else ids_of_first_rank(generations, drawn)


def steered(generations: Sequence[Generation], logits: Tensor) -> tuple[Tensor, list[int]]:
    """(logits to draw from, rows that failed); see `Steering`. Other rows are unchanged."""
    rows = [i for i, generation in enumerate(generations) if generation.steering is not None]
    if not rows:
        return logits, []
    logits, failed = logits.clone(), []
    for i in rows:
        generation, steering = generations[i], generations[i].steering
        assert steering is not None
        try:
            steering.apply(logits[i], generation.tokens, len(generation.request.prompt))
        except Exception as e:  # the grammar's: the other rows go on
            steering.error = without_frames(e)
            logits[i] = 0.0  # so that the others can be drawn
            failed.append(i)
    return logits, failed


def ids_of_first_rank(generations: Sequence[Generation], drawn: Tensor) -> Tensor:
    """The first rank's ids, after a check that it runs the same requests.

    Raises:
        RuntimeError: it runs others, or in another order.
    """
    state = [(g.id, g.tokens[-1 if g.ids else 0 :]) for g in generations]
    checksum = zlib.crc32(repr(state).encode())
    padded = F.pad(drawn, (0, 1), value=checksum)
    *ids, other = tensor_parallel.broadcast_from_first(padded).tolist()
    if other != checksum:
        raise RuntimeError("rank 0 runs other requests: make the same calls on every rank")
    return drawn.new_tensor(ids)


def chosen_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probability of each row's id: (B, V) and (B,) -> (B,)."""
    return torch.log_softmax(logits, dim=-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def score_prompt(
    model: Transformer, generation: Generation, hidden: Tensor, start: int, length: int
) -> Scores:
    """Log-probabilities of the prompt's ids that a chunk predicts, a slice of logits at a time.

    Args:
        hidden: (T, dim) normed hidden states of a chunk.
        start: the chunk's position.
        length: how much of it is not padding.
    """
    request, scores = generation.request, Scores([], [])
    if request.score_from is None:
        return scores
    end = min(start + length + 1, len(request.prompt))
    for at in range(max(start + 1, request.score_from), end, SCORE_CHUNK):
        chosen = generation.tokens[at : min(at + SCORE_CHUNK, end)]
        logits = model.logits(hidden.narrow(0, at - 1 - start, len(chosen)))
        index = torch.tensor(chosen, device=hidden.device)
        scores.logprobs.extend(chosen_logprobs(logits, index).tolist())
        if request.top_logprobs:
            scores.top.extend(top_logprobs(logits, model.unused, request.top_logprobs))
    return scores
