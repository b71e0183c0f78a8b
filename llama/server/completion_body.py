"""The body of POST /v1/completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llama.server.common_body import (
    IDS,
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    CommonBody,
    check_refused,
)
from llama.server.errors import invalid, quoted
from llama.server.fields import Custom, Flag, Integer, read_record, wire

MAX_PROMPTS = 128
MAX_GENERATIONS = 256  # prompts x n
DEFAULT_MAX_TOKENS = 16  # OpenAI's

REFUSED = {
    "suffix": "the models were not trained to fill in; put the text into the prompt",
}


def _read_prompt(value: Any, param: str) -> tuple[str | tuple[int, ...], ...]:
    """The prompts: texts, or ids."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise invalid(
            param, f"{param} must be text, token ids, or a list of either, not {quoted(value)}"
        )
    if not value:
        raise invalid(param, f"{param} is an empty list; give a text or token ids")
    if _is_id(value[0]):
        return (_read_ids(value, param),)
    if len(value) > MAX_PROMPTS:
        raise invalid(param, f"{param} has {len(value)} prompts; at most {MAX_PROMPTS} are taken")
    found = enumerate(value)
    return tuple(
        item if isinstance(item, str) else _read_ids(item, f"{param}[{i}]") for i, item in found
    )


def _is_id(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_ids(value: Any, param: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise invalid(param, f"{param} must be text or a list of token ids, not {quoted(value)}")
    if not value:
        raise invalid(param, f"{param} is empty; give at least one token id")
    ids: tuple[int, ...] = IDS.read(value, param)
    return ids


_IDS = IDS.schema() | {"minItems": 1}
_ONE = {"anyOf": [{"type": "string"}, _IDS]}
_MANY = {"type": "array", "items": _ONE, "minItems": 1, "maxItems": MAX_PROMPTS}
PROMPT = Custom(_read_prompt, {"anyOf": [*_ONE["anyOf"], _MANY]})


@dataclass(frozen=True, kw_only=True)
class CompletionBody(CommonBody):
    """A checked body; see `CommonBody` for the other fields.

    Attributes:
        prompt: texts, or tuples of ids.
    """

    prompt: tuple[str | tuple[int, ...], ...] = wire(
        PROMPT, "Text, token ids, or a list of either. Texts get the begin token, ids do not."
    )
    max_tokens: int = wire(
        Integer(0, MAX_TOKENS),
        "Most tokens to generate, cut to the room that is left. 0 only with echo.",
        DEFAULT_MAX_TOKENS,
    )
    echo: bool = wire(
        Flag(), "The prompt comes before the answer; with logprobs, it is scored too.", False
    )
    logprobs: int | None = wire(
        Integer(0, MAX_TOP_LOGPROBS),
        "Log-probabilities of the tokens, and of this many most probable ones at each.",
        None,
    )
    best_of: int | None = wire(Integer(1, 1), "Only 1: choose among n answers yourself.", None)

    def __post_init__(self) -> None:
        self.check_common()
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens", "max_tokens 0 needs echo: true; or set 1 or more")
        if len(self.prompt) * self.n > MAX_GENERATIONS:
            raise invalid(
                "n", f"{len(self.prompt)} prompts x n = {self.n} answers; at most {MAX_GENERATIONS}"
            )


def parse_completion(data: object) -> CompletionBody:
    """A body from JSON.

    Raises:
        ApiError: 400, naming the field.
    """
    check_refused(data, REFUSED)
    return read_record(CompletionBody, data)
