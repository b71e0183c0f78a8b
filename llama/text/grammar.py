"""Grammars that generated text must follow: JSON schemas, regular expressions, by llguidance.

A `Grammar` is compiled once and shared; each answer has a `GrammarState`, which says after each
token which ids may come next. Knows nothing about models and sampling.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from functools import cache
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor

from llama.common.extras import install_line

MAX_SCHEMA_BYTES = 65_536  # as JSON
MAX_SCHEMA_DEPTH = 64
MAX_PATTERN_LENGTH = 1_000  # characters of a regular expression
# Limits of llguidance. A step that reaches one fails its answer.
_LIMITS = {
    "initial_lexer_fuel": 500_000,  # about 10 ms of building regular expressions
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 50_000,  # 1-2 kB each
    "max_grammar_size": 100_000,
    "verbose_errors": False,  # messages without the text of the answer
}
# Between JSON's tokens: nothing, a space, or a line break and its indentation. Bounded, because a
# model may otherwise write spaces without end.
_JSON_OPTIONS = {
    "whitespace_pattern": r" |\n {0,32}",
    "whitespace_flexible": True,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}


class Vocabulary(Protocol):
    """What a grammar needs of a `Tokenizer`."""

    ranks: dict[bytes, int]
    stop_tokens: list[int]
    unused_ids: Set[int]


class GrammarState:
    """Where one answer is in its grammar."""

    def __init__(self, matcher: Any, rows: int):
        self._matcher, self._rows = matcher, rows
        self._bits = torch.empty((rows + 31) // 32, dtype=torch.int32)

    def allowed(self) -> Tensor:
        """(rows,) bool: ids that may come next; stop tokens only where the text may end.

        Raises:
            ValueError: no id may follow, or the grammar became too complex.
        """
        self._matcher.unsafe_compute_mask_ptr(self._bits.data_ptr(), 4 * len(self._bits))
        self._check()
        allowed = _bits_of_bytes()[self._bits.view(torch.uint8).int()].flatten()[: self._rows]
        if not allowed.any():
            raise ValueError("the vocabulary has no token that continues the text of this grammar")
        return allowed

    def accept(self, token: int) -> None:
        """Advance by a generated id, also by a stop token.

        Raises:
            ValueError: `allowed` forbids the id.
        """
        if not self._matcher.consume_token(token):
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the grammar failed: {_first_line(self._matcher.get_error())}")


class Grammar:
    """A compiled grammar. Immutable: threads and answers share it."""

    def __init__(self, vocabulary: GrammarVocabulary, source: Mapping[str, Any], what: str):
        llguidance = _llguidance()
        limits = llguidance.LLParserLimits(**_LIMITS)
        self._rows = vocabulary.rows
        self._matcher = llguidance.LLMatcher(
            vocabulary.tokenizer, json.dumps(source), log_level=0, limits=limits
        )
        if self._matcher.is_error():
            raise ValueError(f"{what} cannot be used: {_first_line(self._matcher.get_error())}")

    def start(self) -> GrammarState:
        """The state before the first token of an answer."""
        return GrammarState(self._matcher.deep_copy(), self._rows)


class GrammarVocabulary:
    """A tokenizer's vocabulary in llguidance's form. Building one takes 0.3 s with 128k tokens.

    Ids of special tokens, unused ids and the rows of a padded vocabulary have no bytes, so that no
    grammar allows them; stop tokens are the end of the text.
    """

    is_tokenizer_wrapper = True  # llguidance reads this and the next three
    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokenizer: Vocabulary, rows: int):
        stops = [token for token in tokenizer.stop_tokens if 0 <= token < rows]
        if not stops:
            raise ValueError("a grammar needs a tokenizer with a stop token, which ends the text")
        self.rows, self.eos_token_id = rows, stops[0]
        self.tokens = [b""] * rows
        for text, token in tokenizer.ranks.items():
            if token < rows and token not in stops and token not in tokenizer.unused_ids:
                self.tokens[token] = text
        self.tokenizer = _llguidance().LLTokenizer(self, n_vocab=rows, eos_token=stops)
        self.tokens = []

    def __call__(self, text: bytes) -> list[int]:
        raise AssertionError("grammars here force no token, so llguidance tokenizes nothing")


_vocabularies: weakref.WeakKeyDictionary[Any, dict[int, GrammarVocabulary]]
_vocabularies, _lock = weakref.WeakKeyDictionary(), Lock()


def grammar_vocabulary(tokenizer: Vocabulary, rows: int) -> GrammarVocabulary:
    """The tokenizer's `GrammarVocabulary`, which is built once.

    Args:
        rows: the model's vocab_size.
    """
    with _lock:
        known = _vocabularies.setdefault(tokenizer, {})
        if rows not in known:
            known[rows] = GrammarVocabulary(tokenizer, rows)
        return known[rows]


def json_schema_grammar(
    tokenizer: Vocabulary, schema: Mapping[str, Any] | bool, rows: int
) -> Grammar:
    """JSON text that a JSON schema (draft 2020-12) accepts, its properties in the schema's order.

    Args:
        rows: the model's vocab_size.

    Raises:
        TypeError, ValueError: the schema is no schema, too large, has no instance, or has a
            keyword that is not supported.
        ImportError: llguidance is not installed.
    """
    sources = {"schema": json_source(schema, "the schema")}
    return compiled(grammar_vocabulary(tokenizer, rows), "start: @schema", sources, "the schema")


def json_object_grammar(tokenizer: Vocabulary, rows: int) -> Grammar:
    """Any JSON object."""
    return json_schema_grammar(tokenizer, {"type": "object"}, rows)


def regex_grammar(tokenizer: Vocabulary, pattern: str, rows: int) -> Grammar:
    """Text that a regular expression matches as a whole, in the syntax of Rust's `regex`.

    Raises:
        ValueError: the expression is broken or too large.
    """
    check_pattern(pattern)
    lark = f"start: /{_lark_regex(pattern)}/"
    return compiled(grammar_vocabulary(tokenizer, rows), lark, {}, "the regular expression")


def compiled(
    vocabulary: GrammarVocabulary, lark: str, schemas: Mapping[str, Any], what: str
) -> Grammar:
    """The grammar of Lark rules, which name JSON schemas as `@name`."""
    lark = f'%llguidance {{"no_forcing": true}}\n{lark}'
    grammars: list[dict[str, Any]] = [{"lark_grammar": lark}]
    grammars += [{"name": name, "json_schema": schema} for name, schema in schemas.items()]
    return Grammar(vocabulary, {"grammars": grammars}, what)


def json_source(schema: Mapping[str, Any] | bool, what: str) -> dict[str, Any]:
    """A checked schema with llguidance's options.

    Raises:
        TypeError, ValueError: the schema is no schema or too large.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, Mapping):
        raise TypeError(f"{what} must be a JSON object or a bool, not {type(schema).__name__}")
    check_schema(schema, what)
    return {**schema, "x-guidance": _JSON_OPTIONS}


def check_schema(schema: Mapping[str, Any], what: str) -> None:
    """Raise a ValueError if a schema is too large or too deep, or has too long a pattern."""
    for depth, value in _nested(schema):
        if depth > MAX_SCHEMA_DEPTH:
            raise ValueError(
                f"{what} is nested more than {MAX_SCHEMA_DEPTH} levels deep; use $ref and $defs"
            )
        if isinstance(value, Mapping) and isinstance(value.get("pattern"), str):
            check_pattern(value["pattern"])
    try:
        size = len(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from None
    if size > MAX_SCHEMA_BYTES:
        raise ValueError(f"{what} has {size} bytes of JSON; use at most {MAX_SCHEMA_BYTES}")


def check_pattern(pattern: str) -> None:
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise ValueError(
            f"a regular expression has {len(pattern)} characters; use at most {MAX_PATTERN_LENGTH}"
        )


def _nested(value: object) -> Iterator[tuple[int, object]]:
    """(depth, value) of `value` and all values in it. Not recursive."""
    waiting = [(1, value)]
    while waiting:
        depth, value = waiting.pop()
        yield depth, value
        inner = value.values() if isinstance(value, Mapping) else value
        if isinstance(inner, Collection) and not isinstance(inner, (str, bytes)):
            waiting += [(depth + 1, item) for item in inner]


def _lark_regex(pattern: str) -> str:
    text: str = _llguidance().regex_to_lark(pattern, "")
    return text


@cache
def _bits_of_bytes() -> Tensor:
    """(256, 8) bool: the bits of each byte, the lowest first."""
    return (torch.arange(256)[:, None] >> torch.arange(8)) % 2 == 1


def _first_line(message: str) -> str:
    return message.strip().split("\n")[0][:500]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ImportError(f"structured output needs a package: {install_line('serve')}") from error
    return llguidance
