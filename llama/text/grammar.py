"""Grammars that generated text must follow: JSON schemas, regular expressions, by llguidance.

A `Grammar` is compiled once and shared; each answer has a `GrammarState`, which says before each
token which ids may come next. Knows nothing about models and sampling.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from llama.common.daemon_thread import call_in_daemon
from llama.common.errors import GrammarError
from llama.common.extras import install_line
from llama.text.json_schema import checked_schema

MAX_PATTERN_LENGTH = 1_000  # characters of a regular expression
# Of llguidance. A grammar that reaches one is refused, or fails its own answer; a step takes at
# most some 20 ms.
_LIMITS = {
    "initial_lexer_fuel": 500_000,  # about 10 ms of building regular expressions
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 50_000,  # 1-2 kB each; a string takes one a character
    "max_grammar_size": 100_000,
    "verbose_errors": False,  # no text of the answer in messages
}
# Between JSON's tokens: nothing, a space, or a line break and an indentation. Models may write
# unbounded spaces without end.
_JSON_OPTIONS = {
    "whitespace_pattern": r" |\n {0,32}",
    "whitespace_flexible": True,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}
_STACK = 2**27  # the largest schema takes half of it
_stack_lock = threading.Lock()  # the size is the process's
Result = TypeVar("Result")


class Vocabulary(Protocol):
    """What a grammar needs of a `Tokenizer`."""

    ranks: dict[bytes, int]
    stop_tokens: list[int]
    unused_ids: Set[int]


class GrammarState:
    """How far one answer has followed its grammar."""

    def __init__(self, matcher: Any, rows: int):
        self._matcher, self._rows = matcher, rows
        self._words = torch.empty((rows + 31) // 32, dtype=torch.int32)  # a bit for each id

    def allowed(self) -> Tensor:
        """(rows,) bool: ids that may come next; stop tokens only where the text may end.

        Raises:
            GrammarError: no id may follow, or the grammar has become too complex.
        """
        self._matcher.unsafe_compute_mask_ptr(self._words.data_ptr(), 4 * len(self._words))
        self._check()
        if not self._words.any():
            raise GrammarError("the vocabulary has no token for the text that the grammar asks for")
        bits = _bits_of_bytes()[self._words.view(torch.uint8).int()]
        return bits.view(torch.bool)[: self._rows]

    def accept(self, token: int) -> None:
        """Advance by a generated id, which may be a stop token.

        Raises:
            GrammarError: `allowed` forbids the id.
        """
        if not self._matcher.consume_token(token):
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar failed: {_reason(self._matcher.get_error())}")


class Grammar:
    """A compiled grammar. It never changes: threads and answers share it."""

    def __init__(self, vocabulary: GrammarVocabulary, source: Mapping[str, Any], what: str):
        self._rows = vocabulary.rows
        self._matcher = _on_large_stack(lambda: self._compile(vocabulary, source, what))

    def _compile(self, vocabulary: GrammarVocabulary, source: Mapping[str, Any], what: str) -> Any:
        llguidance = _llguidance()
        matcher = llguidance.LLMatcher(  # drops the GIL
            vocabulary.tokenizer,
            json.dumps(source),
            log_level=0,
            limits=llguidance.LLParserLimits(**_LIMITS),
        )
        if matcher.is_error():
            raise ValueError(f"{what} cannot be used: {_reason(matcher.get_error())}")
        try:
            GrammarState(matcher, self._rows).allowed()
        except GrammarError as error:
            raise ValueError(f"{what} allows no text: {error}") from None
        return matcher

    def start(self) -> GrammarState:
        """The state before the first token of an answer."""
        return GrammarState(self._matcher.deep_copy(), self._rows)


class GrammarVocabulary:
    """A tokenizer's vocabulary in llguidance's form. Building one takes 0.3 s with 128k tokens.

    Ids of special tokens, unused ids and the rows of a padded vocabulary have no bytes, so that no
    grammar allows them. Stop tokens end the text.

    Args:
        rows: the model's vocab_size.
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
        raise AssertionError("no grammar here forces tokens, so llguidance tokenizes nothing")


_vocabularies: weakref.WeakKeyDictionary[Vocabulary, dict[int, GrammarVocabulary]]
_vocabularies, _lock = weakref.WeakKeyDictionary(), threading.Lock()


def grammar_vocabulary(tokenizer: Vocabulary, rows: int) -> GrammarVocabulary:
    """The tokenizer's `GrammarVocabulary` for a model with `rows` ids, which is built once."""
    with _lock:
        known = _vocabularies.setdefault(tokenizer, {})
        if rows not in known:
            known[rows] = GrammarVocabulary(tokenizer, rows)
        return known[rows]


def json_schema_grammar(
    tokenizer: Vocabulary, schema: Mapping[str, Any] | bool, rows: int
) -> Grammar:
    """JSON text that a JSON schema accepts, with the properties in the schema's order.

    Args:
        rows: the model's vocab_size.

    Raises:
        TypeError, ValueError: the schema is no schema, too large, accepts nothing, or has a
            keyword that is not supported.
        ImportError: llguidance is not installed.
    """
    what = "the JSON schema"
    schemas = {"schema": checked_schema(schema, what)}
    return compiled(grammar_vocabulary(tokenizer, rows), "start: @schema", schemas, what)


def json_object_grammar(tokenizer: Vocabulary, rows: int) -> Grammar:
    """Any JSON object."""
    return json_schema_grammar(tokenizer, {"type": "object"}, rows)


def regex_grammar(tokenizer: Vocabulary, pattern: str, rows: int) -> Grammar:
    """Text that a regular expression matches as a whole, in the syntax of Rust's `regex`.

    Raises:
        TypeError: it is no text.
        ValueError: the expression is broken or too large.
        ImportError: llguidance is not installed.
    """
    if not isinstance(pattern, str):
        raise TypeError(f"a regular expression must be text, not {type(pattern).__name__}")
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise ValueError(
            f"a regular expression of {len(pattern)} characters; use at most {MAX_PATTERN_LENGTH}"
        )
    lark = f"start: /{_llguidance().regex_to_lark(pattern, '')}/"
    return compiled(grammar_vocabulary(tokenizer, rows), lark, {}, "the regular expression")


def compiled(
    vocabulary: GrammarVocabulary, lark: str, schemas: Mapping[str, dict[str, Any]], what: str
) -> Grammar:
    """The grammar of Lark rules.

    Args:
        schemas: JSON schemas that the rules call `@name`.
        what: the name of it all in messages.

    Raises:
        ValueError: llguidance refuses it.
    """
    # Every token that fits is allowed, not only the one that a tokenizer would choose.
    grammars: list[dict[str, Any]] = [
        {"lark_grammar": f'%llguidance {{"no_forcing": true}}\n{lark}'}
    ]
    for name, schema in schemas.items():
        schema = schema | {"x-guidance": _JSON_OPTIONS}
        grammars.append({"name": name, "json_schema": schema})
    return Grammar(vocabulary, {"grammars": grammars}, what)


def _on_large_stack(function: Callable[[], Result]) -> Result:
    """Call `function` in a thread of its own with `_STACK` bytes.

    llguidance recurses along the references of a schema, and an overflow would end the process.
    """
    with _stack_lock:
        before = threading.stack_size(_STACK)
        try:
            future = call_in_daemon(function)
        finally:
            threading.stack_size(before)
    return future.result()


@cache
def _bits_of_bytes() -> Tensor:
    """(256,) int64, each of 8 bools: the bits of each byte, the lowest first."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) % 2 == 1
    return bits.view(torch.int64).flatten()


def _reason(message: str) -> str:
    """llguidance's message without the trace and the source that may follow."""
    if message.startswith("panic"):
        return "the grammar library failed; simplify it"
    if "coerce_one_of" in message:
        return "the alternatives of a oneOf may overlap; use anyOf"
    if "NoExtension" in message:
        return "no token may follow: the vocabulary lacks the text, or a $ref leads to itself"
    first, *rest = message.strip().splitlines()
    errors = [line for line in rest if line.startswith("error: ")]
    return " ".join([first, *errors[:1]])[:300]


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ImportError(f"structured output needs a package: {install_line('serve')}") from error
    return llguidance
