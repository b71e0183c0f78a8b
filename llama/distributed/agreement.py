"""What the ranks of a model tell each other before and after work that one of them may fail at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from llama.distributed import job, tensor_parallel


def check_same_on_ranks(facts: dict[str, Any]) -> None:
    """Check on every rank that all have the same facts.

    Raises:
        ValueError: they differ; the message names the first fact that does.
    """
    job.check_equal(dict(tensor_parallel.gather_json([_number(), facts])))


@contextlib.contextmanager
def fails_on_all_ranks() -> Iterator[None]:
    """A block in which an exception on one rank raises on all; the group stays usable.

    If all ranks have the same error, each raises its own.

    Raises:
        RankError: the error of the first rank that failed.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
    text = None if error is None else f"{type(error).__name__}: {error}"
    found = tensor_parallel.gather_json([_number(), text])
    if error is not None and len({text for _, text in found}) == 1:
        raise error
    for number, text in found:
        if text is not None:
            raise job.RankError(f"rank {number}: {text}") from error


def _number() -> int:
    """This rank's number in the job."""
    return dist.get_rank() if dist.is_initialized() else 0
