"""Log-probabilities of given ids, and perplexity. Knows no tokenizer."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from llama.common.progress import progress
from llama.distributed import job
from llama.engine.engine import Engine
from llama.engine.request import Request


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        tokens: the number of predicted tokens.
        nats: the sum of their negative natural log-probabilities.
        size: UTF-8 bytes of the text.
        seconds: duration of scoring.
    """

    tokens: int
    nats: float
    size: int
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp(nats per token); may be infinite. Comparable between models with one tokenizer."""
        try:
            return math.exp(self.nats / self.tokens)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between models with different tokenizers."""
        return self.nats / math.log(2) / self.size

    def __str__(self) -> str:
        perplexity = "infinity" if math.isinf(self.perplexity) else f"{self.perplexity:.4f}"
        return (
            f"perplexity {perplexity}, {self.bits_per_byte:.4f} bits per byte "
            f"({self.tokens} tokens, {self.size} bytes, {self.tokens / self.seconds:.1f} tokens/s)"
        )

    def as_json(self) -> str:
        """A JSON object of the attributes, `perplexity` and `bits_per_byte`; null if infinite."""
        values = {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte} | asdict(self)
        finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
        return json.dumps(finite, allow_nan=False)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, line ends unchanged.

    Raises:
        ValueError: the file is empty or not UTF-8.
        OSError: the file cannot be read.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not text in UTF-8: {e.reason} at byte {e.start}") from None
    if not text:
        raise ValueError(f"{path} is empty")
    return text


def check_windows(context: int, stride: int | None) -> int:
    """The stride of the sliding windows over a text: half of the context if None.

    Raises:
        ValueError: the context or the stride is out of range.
    """
    if type(context) is not int or context < 2:
        raise ValueError(f"context must be 2 or more tokens, not {context!r}")
    stride = context // 2 if stride is None else stride
    if type(stride) is not int or not 1 <= stride < context:
        raise ValueError(f"stride must be 1 to {context - 1} (context - 1), not {stride!r}")
    return stride


def windows(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, first scored, end) of windows of at most `context` ids that score each id once.

    The first window scores all its ids. Each later one scores at most `stride` ids, its last, so
    that each of them has at least context - stride ids before it.
    """
    spans = [(0, 0, min(context, length))]
    while (scored := spans[-1][2]) < length:
        end = min(scored + stride, length)
        spans.append((end - context, scored, end))
    return spans


def score_ids(
    engine: Engine,
    ids: Sequence[int],
    bos_id: int = -1,
    stride: int | None = None,
    show: bool = False,
    adapter: str | None = None,
) -> list[float | None]:
    """Log-probability of each id given those before it in its window; None for the first id.

    Args:
        bos_id: if `ids` begin with it, every window begins with it.
        stride: ids that each window of max_seq_len adds to the one before; None: max_seq_len / 2.
        show: show a progress bar after two seconds.
        adapter: see `Request`.

    Raises:
        ValueError: `ids` is empty, or the stride is out of range.
    """
    context, at_once = engine.room, engine.model.params.max_batch_size
    stride = check_windows(context, stride)
    if not ids:
        raise ValueError("there are no tokens to score")

    def request_of(begin: int, scored: int, end: int) -> Request:
        window = list(ids[begin:end])
        if begin and ids[0] == bos_id:
            window[0] = bos_id
        return Request(window, 0, score_from=scored - begin, reuse=False, adapter=adapter)

    scores: list[float | None] = []
    spans = windows(len(ids), context, stride)
    batches = [spans[i : i + at_once] for i in range(0, len(spans), at_once)]
    show = show and job.is_leader()
    for batch in progress(batches, "scoring", unit="batch") if show else batches:
        for generation in engine.run([request_of(*window) for window in batch]):
            if generation.error is not None:
                raise generation.error
            scores += generation.prompt_logprobs[generation.request.score_from or 0 :]
    return scores


def perplexity(
    engine: Engine,
    ids: Sequence[int],
    size: int,
    bos_id: int = -1,
    stride: int | None = None,
    adapter: str | None = None,
) -> Perplexity:
    """The perplexity of `ids`, the tokens of a text of `size` bytes. See `score_ids`."""
    start = time.perf_counter()
    scores = score_ids(engine, ids, bos_id, stride, show=True, adapter=adapter)
    known = [score for score in scores if score is not None]
    if not known:
        raise ValueError("the text is too short: it needs two tokens or more")
    return Perplexity(len(known), -math.fsum(known), size, time.perf_counter() - start)
