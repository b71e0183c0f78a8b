"""What a step computes for neighbouring rows of the cache: hidden states, scores, drawn ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama.distributed import tensor_parallel
from llama.engine.compiled_step import CompiledStep
from llama.engine.drawing import NextId, Place, chosen_logprobs, draw_at
from llama.engine.drawing_step import Row, draw_rows
from llama.engine.forks import check_not_forked
from llama.engine.proposal import NOTHING, Proposal
from llama.engine.request import Generation, TopLogprobs
from llama.engine.sampling import top_logprobs
from llama.engine.slots import Slot
from llama.layers.adapter_rows import selected
from llama.model import KVCache, Transformer

# Prompt positions whose logits are held at once when a prompt is scored: 128 x 128,256 x 4 bytes.
SCORE_CHUNK = 128


class Scores(NamedTuple):
    """Log-probabilities of the prompt's ids that a chunk predicts; empty if not asked for."""

    logprobs: list[float]
    top: list[TopLogprobs]


class Chunk(NamedTuple):
    """The ids that a step feeds one row.

    Attributes:
        start: the position of the first of them.
        ids: those of the generation, then those that are proposed to follow them.
        whole: they are all that was pending, so that the next id can be drawn.
    """

    generation: Generation
    start: int
    ids: list[int]
    whole: bool
    proposal: Proposal = NOTHING

    @staticmethod
    def of(slots: Sequence[Slot], most: int, proposals: Sequence[Proposal] = ()) -> list[Chunk]:
        """At most `most` pending ids of each slot; after them, what is proposed for each."""
        chunks = []
        for slot, proposal in zip(slots, proposals or [NOTHING] * len(slots), strict=True):
            start, tokens = len(slot.cached), slot.running.tokens
            ids = tokens[start : start + most]
            whole = start + len(ids) == len(tokens)
            chunks.append(Chunk(slot.running, start, [*ids, *proposal.ids], whole, proposal))
        return chunks

    def without_proposal(self) -> Chunk:
        ids = self.ids[: len(self.ids) - len(self.proposal.ids)]
        return self._replace(ids=ids, proposal=NOTHING)

    def kept(self, drawn: int) -> int:
        """How many of the ids stay in the row if so many were drawn: all but rejected ones."""
        return len(self.ids) - len(self.proposal.ids) + max(0, drawn - 1)


def compute(
    model: Transformer,
    cache: Sequence[KVCache],
    chunks: Sequence[Chunk],
    first_row: int,
    compiled: CompiledStep | None = None,
) -> tuple[Sequence[Chunk], int, list[Scores], dict[int, list[NextId]]]:
    """Feed neighbouring rows, score their prompts, and draw where a chunk is whole.

    Args:
        first_row: the cache row of the first chunk.
        compiled: used if every chunk is one id and first_row is 0; None: never.

    Returns:
        (the chunks, positions written in each row, scores of each row's prompt ids, `draw_at`).
        The chunks are without proposals if these have made something infinite or NaN.

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
        return chunks, 1, [Scores([], []) for _ in chunks], drawn_by_graph(compiled, chunks)
    h, chunks = feed(model, cache, chunks, first_row, compiled)
    width = h.shape[1]
    scores = [
        score_prompt(model, chunk.generation, h[i], chunk.start, len(chunk.ids))
        for i, chunk in enumerate(chunks)
    ]
    places = [
        Place(
            chunk.generation,
            i * width + len(chunk.ids) - len(chunk.proposal.ids) - 1,
            chunk.proposal,
        )
        for i, chunk in enumerate(chunks)
        if chunk.whole and chunk.generation.budget > 0
    ]
    return chunks, width, scores, draw_at(model, h, places) if places else {}


def feed(
    model: Transformer,
    cache: Sequence[KVCache],
    chunks: Sequence[Chunk],
    first_row: int,
    compiled: CompiledStep | None,
) -> tuple[Tensor, Sequence[Chunk]]:
    """Hidden states of the chunks, and the chunks that were fed; see `compute`."""
    starts = [chunk.start for chunk in chunks]
    with selected(model, [chunk.generation.request.adapter for chunk in chunks]):
        ids = [chunk.ids for chunk in chunks]
        h = hidden_of_chunks(model, cache, ids, starts, first_row, compiled)
        if not any(chunk.proposal.ids for chunk in chunks) or bool(h.isfinite().all()):
            return h, chunks
        for row, start in enumerate(starts, first_row):  # NaN would stay: 0 times NaN is NaN
            for layer in cache:
                layer.clear(row, start, start + h.shape[1])
        chunks = [chunk.without_proposal() for chunk in chunks]
        ids = [chunk.ids for chunk in chunks]
        return hidden_of_chunks(model, cache, ids, starts, first_row, compiled), chunks


def decodes(chunk: Chunk) -> bool:
    """Whether the chunk is one id, from which the next is drawn plainly, and nothing is scored."""
    generation, request = chunk.generation, chunk.generation.request
    if generation.steering is not None or request.top_logprobs:
        return False
    scored = request.score_from is not None and chunk.start < len(request.prompt)
    return chunk.whole and len(chunk.ids) == 1 and generation.budget > 0 and not scored


def drawn_by_graph(compiled: CompiledStep, chunks: Sequence[Chunk]) -> dict[int, list[NextId]]:
    """As `draw_at`, for chunks that `decodes`."""
    rows = []
    for generation, start, ids, *_ in chunks:
        rows.append(Row(ids[0], start, generation.request.sampling, generation.generator))
    drawn = {}
    for (generation, *_), found in zip(chunks, draw_rows(compiled, rows), strict=True):
        logprob = found.logprob if generation.request.logprobs else 0.0
        logprob = logprob if found.finite else math.nan
        drawn[generation.id] = [NextId(found.token, logprob, [], None)]
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
