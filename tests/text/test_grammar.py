"""Grammars against a brute-force check of whole vocabularies, `jsonschema`, and bad schemas."""

from __future__ import annotations

import base64
import gc
import json
import threading
import weakref
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import pytest
import regex
import torch

from llama.text.grammar import (
    Grammar,
    grammar_vocabulary,
    json_object_grammar,
    json_schema_grammar,
    regex_grammar,
)
from llama.tokenizer import Tokenizer
from tests.text.bad_schemas import BAD, HARD
from tests.text.schemas import random_object, random_schema

PADDING = 70  # rows that the model has beyond the vocabulary
SPACE = r"(?: |\n {0,32})?"  # between JSON's tokens


@pytest.fixture(scope="module")
def llama3(llama3_tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(llama3_tokenizer_path, "llama3.1")


@pytest.fixture(scope="module")
def demo_vocabulary(demo_dir: Path) -> Tokenizer:
    return Tokenizer(demo_dir / "tokenizer.model")


@pytest.fixture(scope="module")
def odd() -> Tokenizer:
    """Bytes and a few words; unused ids, a token that text stands for, an ordinary stop token."""
    texts = [bytes([i]) for i in range(256)] + [b"12", b'{"', b'":', b"</s>", b"true", b'"a"']
    lines = (f"{base64.b64encode(text).decode()} {i}" for i, text in enumerate(texts))
    special = {"<|end|>": 263, '{"a"': 265, "1": 270}
    sidecar = {
        "special_tokens": special,
        "text_tokens": {'{"a"': [], "1": []},
        "stop_tokens": ["<|end|>", 259],
        "unused_ids": [262, 264, 266, 267, 268, 269],
        "eos_token": "<|end|>",
        "bos_token": None,
        "pad_token": None,
        "chat_format": None,
    }
    return Tokenizer.from_vocabulary("\n".join(lines).encode(), sidecar, "odd")


def rows_of(tokenizer: Tokenizer) -> int:
    return tokenizer.n_words + PADDING


def brute_force(tokenizer: Tokenizer, pattern: bytes, text: bytes) -> torch.Tensor:
    """Ids that keep `text` the beginning of a text that `pattern` matches, and stop tokens."""
    ends = regex.fullmatch(pattern, text) is not None
    allowed = torch.zeros(rows_of(tokenizer), dtype=torch.bool)
    allowed[tokenizer.stop_tokens] = ends
    for token, i in tokenizer.ranks.items():
        if i not in tokenizer.stop_tokens and i not in tokenizer.unused_ids:
            allowed[i] = regex.fullmatch(pattern, text + token, partial=True) is not None
    return allowed


def walk(grammar: Grammar, tokenizer: Tokenizer, seed: int, steps: int = 600) -> bytes | None:
    """A text of random tokens; None if it has not ended after `steps`."""
    ids: list[int] = []
    random, state = Random(seed), grammar.start()
    for _ in range(steps):
        token = random.choice(state.allowed().nonzero().flatten().tolist())
        state.accept(token)
        if token in tokenizer.stop_tokens:
            return tokenizer.decode_bytes(ids)
        ids.append(token)
    return None


CASES: list[tuple[dict[str, Any], str]] = [
    ({"enum": ["red", "re", 12, 'q"é😀', None, 1.5]}, r'"(red|re|q\\"é😀)"|12|null|1\.5'),
    ({"type": "string", "pattern": "^[ab]{1,3}(é|日)?$"}, '"[ab]{1,3}(?:é|日)?"'),
    (
        {
            "type": "object",
            "properties": {"a": {"enum": [8, 12]}, "b": {"type": "boolean"}},
            "required": ["a"],
            "additionalProperties": False,
        },
        r'\{W"a"W:W(8|12)(W,W"b"W:W(true|false))?W\}',
    ),
    (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2},
        r"\[W(true|false)(W,W(true|false))?W\]",
    ),
]


@pytest.mark.parametrize("name", ["llama3", "demo_vocabulary", "odd"])
@pytest.mark.parametrize(("schema", "pattern"), CASES)
def test_allowed_ids_are_those_of_a_brute_force_check(
    request: pytest.FixtureRequest, name: str, schema: dict[str, Any], pattern: str
) -> None:
    """Over all rows: also special tokens, unused ids and padding, which are never allowed."""
    tokenizer: Tokenizer = request.getfixturevalue(name)
    grammar = json_schema_grammar(tokenizer, schema, rows_of(tokenizer))
    compact, text, random = pattern.replace("W", SPACE).encode(), b"", Random(0)
    state = grammar.start()
    for step in range(60):
        allowed = state.allowed()
        if name == "odd" or step in (0, 3):  # the others are large
            assert torch.equal(allowed, brute_force(tokenizer, compact, text)), text
        token = random.choice(allowed.nonzero().flatten().tolist())
        state.accept(token)
        if token in tokenizer.stop_tokens:
            break
        text += tokenizer.decode_bytes([token])
    else:
        pytest.fail(f"no end: {text!r}")


def test_random_schemas_give_documents_that_validate(demo_vocabulary: Tokenizer) -> None:
    ended = 0
    for seed in range(200):
        schema = (random_object if seed % 2 else random_schema)(Random(seed))
        grammar = json_schema_grammar(demo_vocabulary, schema, rows_of(demo_vocabulary))
        text = walk(grammar, demo_vocabulary, seed)
        if text is not None:
            jsonschema.validate(
                json.loads(text.decode()),
                schema,
                jsonschema.Draft202012Validator,
                format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
            )
            ended += 1
    assert ended >= 190


def test_any_object(odd: Tokenizer) -> None:
    grammar = json_object_grammar(odd, rows_of(odd))
    texts = [walk(grammar, odd, seed, 200) for seed in range(30)]
    found = [json.loads(text) for text in texts if text is not None]
    assert found and all(isinstance(value, dict) for value in found)


def test_regular_expression(odd: Tokenizer) -> None:
    grammar = regex_grammar(odd, r"[a-c]{2}/\d+é", rows_of(odd))
    texts = {walk(grammar, odd, seed) for seed in range(10)}
    assert len(texts) > 5
    for text in texts:
        assert text and regex.fullmatch(r"[a-c]{2}/\d+é", text.decode())


def test_states_are_independent(odd: Tokenizer) -> None:
    grammar = json_schema_grammar(odd, {"enum": ["ab", "cd"]}, rows_of(odd))
    one, two = grammar.start(), grammar.start()
    for text in b'"a':
        one.accept(text)
    two.accept(ord('"'))
    assert one.allowed().nonzero().flatten().tolist() == [ord("b")]
    assert two.allowed().nonzero().flatten().tolist() == [ord("a"), ord("c")]
    with pytest.raises(ValueError, match="the grammar failed"):
        one.accept(ord("x"))
    assert two.allowed().any()


def test_a_text_that_the_vocabulary_lacks(demo_vocabulary: Tokenizer) -> None:
    """The vocabulary has no byte 0xF1, which begins this character."""
    schema = {"const": "\U00040000"}
    with pytest.raises(ValueError, match=r"the vocabulary (has no token|lacks)"):
        state = json_schema_grammar(demo_vocabulary, schema, 49152).start()
        for _ in range(3):
            state.accept(int(state.allowed().nonzero()[0]))


@pytest.mark.parametrize("name", BAD)
def test_a_schema_that_cannot_be_used_is_refused(odd: Tokenizer, name: str) -> None:
    schema, message = BAD[name]
    with pytest.raises(ValueError, match=message) as caught:
        json_schema_grammar(odd, schema, rows_of(odd))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("schema", [None, [], "x", 1])
def test_what_is_no_schema(odd: Tokenizer, schema: Any) -> None:
    with pytest.raises(TypeError, match="must be a JSON object or a bool"):
        json_schema_grammar(odd, schema, rows_of(odd))


def test_what_is_no_pattern(odd: Tokenizer) -> None:
    pattern: Any = 3
    with pytest.raises(TypeError, match="must be text, not int"):
        regex_grammar(odd, pattern, rows_of(odd))


@pytest.mark.parametrize("name", HARD)
def test_a_hard_schema_ends_or_fails_its_own_answer(odd: Tokenizer, name: str) -> None:
    """No hang and no crash: of the compiler, of a step, of another thread with a small stack."""
    grammar = json_schema_grammar(odd, HARD[name], rows_of(odd))
    try:
        walk(grammar, odd, 0, 300)
    except ValueError as error:
        assert "the grammar failed: lexer error: too" in str(error)


def test_threads_compile_and_step_at_once(llama3: Tokenizer) -> None:
    rows, texts = rows_of(llama3), []
    shared = json_schema_grammar(llama3, {"enum": ["one", "two"]}, rows)

    def work(seed: int) -> None:
        own = json_schema_grammar(llama3, {"enum": [f"s{seed}"]}, rows)
        texts.append((walk(shared, llama3, seed), walk(own, llama3, seed)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {one for one, _ in texts} == {b'"one"', b'"two"'}
    assert {own for _, own in texts} == {f'"s{seed}"'.encode() for seed in range(8)}


def test_a_vocabulary_is_built_once_and_freed_with_its_tokenizer(
    byte_tokenizer_path: Path,
) -> None:
    tokenizer = Tokenizer(byte_tokenizer_path)
    assert grammar_vocabulary(tokenizer, 512) is grammar_vocabulary(tokenizer, 512)
    assert grammar_vocabulary(tokenizer, 520).rows == 520
    freed = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert freed() is None


def test_a_vocabulary_without_a_stop_token(odd: Tokenizer) -> None:
    with pytest.raises(ValueError, match="a stop token"):
        json_schema_grammar(odd, True, 250)  # the model has fewer rows
