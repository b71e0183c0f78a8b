"""Fields that chat and text completions have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llama.server.errors import invalid, quoted
from llama.server.fields import Custom, Flag, Integer, Items, Nested, Number, Text, wire

MAX_ANSWERS = 16  # n
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_BIASES = 300
MAX_TOP_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
MAX_IDS = 2**20  # in a list; more than fit any model
TOKEN_ID = Integer(0, 2**31 - 1)


def _read_ids(value: Any, param: str) -> tuple[int, ...]:
    """Plain integers at once: a list may fill a body of many megabytes."""
    ids = Items(TOKEN_ID, 0, MAX_IDS)
    plain = isinstance(value, list) and 0 < len(value) <= MAX_IDS
    if plain and set(map(type, value)) == {int} and min(value) >= 0 and max(value) < 2**31:
        return tuple(value)
    return ids.read(value, param)


IDS = Custom(_read_ids, Items(TOKEN_ID, 0, MAX_IDS).schema())

MODEL = Text(0, 1000)

# Fields of OpenAI's API that change nothing here, as any other unknown key.
IGNORED = (
    "user", "store", "metadata", "service_tier", "prompt_cache_key", "safety_identifier",
    "reasoning_effort", "verbosity",
)  # fmt: skip


def _read_stop(value: Any, param: str) -> tuple[str, ...]:
    text = Text(1, MAX_STOP_LENGTH)
    if isinstance(value, str):
        return (text.read(value, param),)
    if not isinstance(value, list):
        raise invalid(param, f"{param} must be text or a list of texts, not {quoted(value)}")
    return Items(text, 0, MAX_STOPS).read(value, param)


_STOP_TEXT = Text(1, MAX_STOP_LENGTH).schema()
STOP = Custom(
    _read_stop,
    {"anyOf": [_STOP_TEXT, {"type": "array", "items": _STOP_TEXT, "maxItems": MAX_STOPS}]},
)


def _read_bias(value: Any, param: str) -> dict[int, float]:
    if not isinstance(value, dict):
        raise invalid(param, f"{param} must be an object of token ids and numbers")
    if len(value) > MAX_BIASES:
        raise invalid(param, f"{param} has {len(value)} entries; at most {MAX_BIASES} are taken")
    found: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9):
            raise invalid(param, f"{param} has the key {quoted(key)}; keys are token ids as text")
        found[int(key)] = Number(-100, 100).read(bias, f"{param}.{int(key)}")
    return found


BIAS = Custom(
    _read_bias,
    {
        "type": "object",
        "propertyNames": {"pattern": "^[0-9]{1,9}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": MAX_BIASES,
    },
)


@dataclass(frozen=True)
class StreamOptions:
    include_usage: bool = wire(Flag(), "Send the usage in a last chunk.", False)
    continuous_usage_stats: bool = wire(
        Flag(), "With include_usage: every chunk has the usage so far.", False
    )


@dataclass(frozen=True, kw_only=True)
class CommonBody:
    """Declared in the order in which the documentation lists them."""

    model: str | None = wire(MODEL, "The base or an adapter, as /v1/models lists them.", None)
    temperature: float | None = wire(
        Number(0, 2), "Randomness; 0 takes the most probable token. Default: the server's.", None
    )
    top_p: float | None = wire(
        Number(0, 1),
        "Draw from the most probable tokens that hold this much of the mass. "
        "Default: the server's.",
        None,
    )
    top_k: int | None = wire(
        Integer(-1, 2**31 - 1),
        "Draw from this many most probable tokens, and those as probable as the last of them; 0 "
        "and -1 are no limit. Default: the server's. "
        "Not in OpenAI's API.",
        None,
    )
    min_p: float | None = wire(
        Number(0, 1),
        "Draw from tokens whose probability is at least this times that of the most probable one. "
        "Default: the server's. Not in OpenAI's API.",
        None,
    )
    presence_penalty: float | None = wire(
        Number(-2, 2),
        "Subtracted from the logits of tokens that the answer has already. Default: the server's.",
        None,
    )
    frequency_penalty: float | None = wire(
        Number(-2, 2),
        "Subtracted from a token's logit each time that the answer has it. Default: the server's.",
        None,
    )
    logit_bias: dict[int, float] | None = wire(
        BIAS, "Added to the logits of these token ids: {id as text: -100 to 100}.", None
    )
    seed: int | None = wire(
        Integer(-(2**63), 2**63 - 1),
        "The same seed draws the same tokens; answer j of n draws with seed + j.",
        None,
    )
    stop: tuple[str, ...] = wire(
        STOP, "The answer ends before the first of these texts, of up to 256 characters.", ()
    )
    n: int = wire(Integer(1, MAX_ANSWERS), "Answers to each prompt, which is computed once.", 1)
    stream: bool = wire(Flag(), "Send server-sent events, a chunk for each step.", False)
    stream_options: StreamOptions | None = wire(
        Nested(StreamOptions),
        "Only with stream. include_usage: a last chunk has the usage; continuous_usage_stats: each "
        "chunk has it so far.",
        None,
    )
    ignore_eos: bool = wire(
        Flag(),
        "Go on after tokens that end an answer, as load tests need; not after what a grammar asks "
        "for. Not in OpenAI's API.",
        False,
    )

    def check_common(self) -> None:
        """Raise an ApiError if fields exclude each other."""
        if self.stream_options is not None and not self.stream:
            raise invalid(
                "stream_options", "stream_options needs stream: true; set it, or leave it out"
            )

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and self.stream_options.continuous_usage_stats  # type: ignore[union-attr]


def check_refused(data: object, refused: dict[str, str]) -> None:
    """Raise an ApiError for a field that is not supported, and would change the answer."""
    if not isinstance(data, dict):
        return
    for name, reason in refused.items():
        if data.get(name) not in (None, ""):
            raise invalid(name, f"{name} is not supported: {reason}")
