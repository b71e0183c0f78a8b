"""Log-probabilities of given ids, and the perplexity they make. Knows nothing about text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llama.engine import Engine
from llama.predictions import run
from llama.request import Request


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        tokens: how many were predicted.
        nats: their summed negative log-probability.
        size: the text's UTF-8 bytes.
        seconds: it took.
    """

    tokens: int
    nats: float
    size: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(nats per token): compares models with the same tokenizer only."""
        return math.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Compares models with any tokenizers."""
        return self.nats / math.log(2) / self.size


def windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first scored, end) of windows of at most `context` ids that score each id once.

    After the first window each scores its last `stride` ids, so that every id has at least
    context - stride ids before it.
    """
    found = [(0, 0, min(context, length))]
    while (scored := found[-1][2]) < length:
        end = min(scored + stride, length)
        found.append((end - context, scored, end))
    return found


def score_ids(
    engine: Engine,
    ids: Sequence[int],
    bos_id: int = -1,
    context: int | None = None,
    stride: int | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> list[float | None]:
    """Log-probability of each id given those before it, in its window; None for the first.

    Args:
        bos_id: if `ids` begin with it, every window does.
        context: ids of a window; None is the model's max_seq_len.
        stride: ids that each later window adds, at most context - 1; None is half of context.
        progress: called with the number of ids that became known.

    Raises:
        ValueError: there is nothing to score, or windows cannot be made so.
    """
    params = engine.model.params
    context = params.max_seq_len if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    if not 2 <= context <= params.max_seq_len:
        raise ValueError(f"context must be 2 to max_seq_len {params.max_seq_len}, not {context}")
    if not 1 <= stride < context:
        raise ValueError(f"stride must be 1 to {context - 1} (context - 1), not {stride}")
    if not ids:
        raise ValueError("there are no tokens to score")
    requests = []
    for begin, scored, end in windows(len(ids), context, stride):
        window = list(ids[begin:end])
        if begin and ids[0] == bos_id:
            window[0] = bos_id
        requests.append(Request(window, 0, score_from=scored - begin))
    scores: list[float | None] = []
    at_once = params.max_batch_size
    for i in range(0, len(requests), at_once):
        running = requests[i : i + at_once]
        run(engine, running)
        for request in running:
            if request.error is not None:
                raise request.error
            new = request.prompt_logprobs[request.score_from or 0 :]
            scores += new
            progress(len(new))
    return scores


def perplexity(
    engine: Engine,
    ids: Sequence[int],
    size: int,
    bos_id: int = -1,
    context: int | None = None,
    stride: int | None = None,
    progress: Callable[[int], object] = lambda n: None,
) -> Perplexity:
    """Score `ids`, the tokens of a text of `size` bytes. Arguments as in `score_ids`."""
    start = time.perf_counter()
    scores = score_ids(engine, ids, bos_id, context, stride, progress)
    known = [score for score in scores if score is not None]
    if not known:
        raise ValueError("the text is too short: no token of it is predicted by another")
    return Perplexity(len(known), -math.fsum(known), size, time.perf_counter() - start)
