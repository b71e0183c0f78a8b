"""Checks of single options of a request."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

MOST_TOP_LOGPROBS = 20


def check_seed(seed: object) -> None:
    """Raise a TypeError unless `seed` is an integer that torch's generators accept."""
    if type(seed) is not int or not -(2**63) <= seed < 2**64:
        raise TypeError(f"seed must be an integer from -2**63 to 2**64 - 1, not {seed!r}")


def check_count(name: str, value: object) -> int:
    """`value` as an int; raise a TypeError or ValueError unless it is an integer of at least 0."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, not {value}")
    return int(value)


def check_chunk(value: int | None, on_gpu: bool) -> int:
    """The prefill_chunk to use; raise a ValueError unless it is a positive integer or None."""
    if value is None:
        return 2048 if on_gpu else 512
    if type(value) is not int or value < 1:
        raise ValueError(f"prefill_chunk must be a positive integer, not {value!r}")
    return value


def check_top_logprobs(value: object) -> None:
    """Raise a TypeError or ValueError unless `value` is an integer from 0 to 20."""
    if check_count("top_logprobs", value) > MOST_TOP_LOGPROBS:
        raise ValueError(f"top_logprobs must be at most {MOST_TOP_LOGPROBS}, not {value}")


def check_number(name: str, value: object) -> float:
    """`value` as a float; raise a TypeError or ValueError unless it is a number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, not {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} is too large a number") from None


def check_time_limit(value: object) -> None:
    """Raise a TypeError or ValueError unless `value` is None or a number of seconds above 0."""
    if value is not None and not 0 < check_number("time_limit", value) < math.inf:
        raise ValueError(f"time_limit must be more than 0 seconds, not {value}")


def check_one_clock(time_limit: float | None, ranks: int) -> None:
    """Raise a ValueError for a time limit with several ranks."""
    if time_limit is not None and ranks > 1:
        raise ValueError(
            "time_limit is for one rank: several have clocks that differ; "
            "cancel the request between two steps, on every rank, instead"
        )


def check_bias(bias: object) -> None:
    """Raise a TypeError or ValueError unless `bias` maps ids to numbers from -100 to 100."""
    if not isinstance(bias, Mapping):
        raise TypeError(f"logit_bias must map token ids to numbers, not be {bias!r}")
    for token, value in bias.items():
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise TypeError(f"logit_bias holds {token!r}, which is not a token id")
        if not -100 <= check_number(f"logit_bias of token {token}", value) <= 100:
            raise ValueError(f"logit_bias of token {token} must lie between -100 and 100")


def check_prompt(name: str, prompt: object) -> None:
    """Raise a TypeError unless `prompt` is a sequence of integers."""
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
        raise TypeError(f"{name} must be a list of token ids, not {type(prompt)}")
    if set(map(type, prompt)) != {int}:  # in most prompts no id needs a look of its own
        for token in prompt:
            if not isinstance(token, Integral) or isinstance(token, bool):
                raise TypeError(f"{name} holds {token!r}, which is not a token id")


def check_adapter(name: str | None, known: Sequence[str]) -> None:
    """Raise a ValueError unless `name` is None or one of the model's adapters."""
    if name is None or name in known:
        return
    if not known:
        raise ValueError(
            f"there is no adapter {name!r}: this model has none; leave adapter out, or build with "
            "adapters={name: folder}"
        )
    raise ValueError(f"there is no adapter {name!r}; use one of {', '.join(known)}, or None")
