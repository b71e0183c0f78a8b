"""The requests of one call, and what its caller gets for them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypedDict, TypeVar

from llama.distributed import tensor_parallel
from llama.engine.engine import Engine
from llama.engine.request import FinishReason, Request
from llama.tokenizer import Message, Tokenizer


class CompletionPrediction(TypedDict, total=False):
    """`tokens` and `logprobs` are there when log-probabilities were asked for.

    `error` says what is wrong with a prompt where `finish_reason` is "error".
    """

    generation: str
    tokens: list[str]
    logprobs: list[float | None]
    finish_reason: FinishReason
    error: str


class ChatPrediction(TypedDict, total=False):
    """As `CompletionPrediction`. The message has a `stop_reason` if it ended with `<|eom_id|>`."""

    generation: Message
    tokens: list[str]
    logprobs: list[float | None]
    finish_reason: FinishReason
    error: str


Prediction = TypeVar("Prediction", CompletionPrediction, ChatPrediction)


def make_requests(
    prompts: Sequence[Sequence[int]], seed: int | Sequence[int] | None, **options: Any
) -> list[Request]:
    """A request a prompt.

    Args:
        seed: of each request's own generator: one for all, or one each. None: no generators.
        options: of every `Request`.

    Raises:
        TypeError, ValueError: there is no such batch.
    """
    if not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a list of lists of token ids, not {type(prompts)}")
    if not prompts:
        raise ValueError("the batch is empty; give at least one prompt")
    seeds = [seed] * len(prompts)  # type: list[Any]
    if isinstance(seed, Sequence) and not isinstance(seed, (str, bytes)):
        seeds = list(seed)
    if len(seeds) != len(prompts):
        raise TypeError(f"seed must be one integer, or one a prompt, not {seed!r}")
    return [
        Request(prompt, seed=seed, name=f"prompt {i}", **options)
        for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]


def run(engine: Engine, requests: Sequence[Request], stacklevel: int = 4) -> None:
    """Run to the end.

    A request that is refused or fails ends with finish_reason "error" and a warning, and the
    others run. If there is no other, its error is raised.

    Args:
        stacklevel: of the warnings; 3 is the line that called this function's caller.
    """
    try:
        for request in requests:
            try:
                engine.add(request)
            except ValueError as e:
                request.fail(e)
        engine.wait(lambda: all(request.finish_reason for request in requests))
    finally:
        for request in requests:
            if request.id:
                engine.cancel(request.id)
    errors = [request.error for request in requests if request.error is not None]
    if len(errors) == len(requests):
        raise errors[0]
    for error in errors if tensor_parallel.rank() == 0 else ():
        warnings.warn(str(error), stacklevel=stacklevel)


def finish(
    prediction: Prediction,
    request: Request,
    tokenizer: Tokenizer,
    logprobs: bool,
    echo: bool = False,
) -> Prediction:
    """Add to a prediction what those of texts and of dialogs have in common."""
    prediction["finish_reason"] = request.finish_reason or "length"
    if request.error is not None:
        prediction["error"] = str(request.error)
    elif logprobs:
        tokens = request.tokens if echo else request.ids
        prediction["tokens"] = [tokenizer.decode([t]) for t in tokens]
        prediction["logprobs"] = [*request.prompt_logprobs, *request.generated_logprobs]
    return prediction


def scored(
    ids: Sequence[int], logprobs: list[float | None], tokenizer: Tokenizer
) -> CompletionPrediction:
    """Of a text that was only scored."""
    return {
        "generation": tokenizer.decode(ids),
        "tokens": [tokenizer.decode([t]) for t in ids],
        "logprobs": logprobs,
        "finish_reason": "length",
    }
