"""What the generating methods pass on to the engine: n, penalties, bias, grammars, limits."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

from llama import Llama, QueueFull, Request, Sampling
from llama.generation import BuildOptions
from llama.layers.adapter_rows import add_adapters
from tests.adapters import random_adapter

Tiny = Callable[..., Path]
SCHEMA = {
    "type": "object",
    "properties": {"yes": {"type": "boolean"}, "kind": {"enum": ["ä", "b", 3]}},
    "required": ["yes", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Tiny, llama3_tokenizer_path: Path) -> Llama:
    """A random model with the real vocabulary, 96 positions, 2 rows."""
    folder = tiny_checkpoint()
    return Llama.build(folder, llama3_tokenizer_path, 96, 2, device="cpu", dtype=torch.float32)


class Only:
    """A grammar of your own: always the same id."""

    def __init__(self, token: int):
        self.mask = torch.arange(token + 1) == token

    def start(self) -> Only:
        return self

    def allowed(self) -> torch.Tensor:
        return self.mask

    def accept(self, token: int) -> None:
        assert self.mask[token]


def test_n_answers_are_rows_with_the_next_seeds(tiny: Llama) -> None:
    prompts = [[128000, 5, 6], [128000, *range(30)]]
    rows, scores = tiny.generate(prompts, 6, temperature=0.9, logprobs=True, n=3, seed=[9, 70])
    want = [
        tiny.generate([prompt], 6, temperature=0.9, seed=seed + j)[0][0]
        for prompt, seed in zip(prompts, (9, 70), strict=True)
        for j in range(3)
    ]
    assert rows == want and scores is not None and [len(row) for row in scores] == [6] * 6
    texts = tiny.text_completion(["Hello", "You"], 0.9, max_gen_len=4, n=2, seed=1)
    alone = [
        tiny.text_completion([t], 0.9, max_gen_len=4, seed=s)[0]
        for t in ("Hello", "You")
        for s in (1, 2)
    ]
    assert texts == alone
    chats = tiny.chat_completion([[{"role": "user", "content": "Hi"}]], 0.9, max_gen_len=3, n=4)
    assert len(chats) == 4
    echoed = tiny.text_completion(["Hello you"], 0, max_gen_len=2, logprobs=True, echo=True, n=3)
    for one in echoed:
        assert one["tokens"] == echoed[0]["tokens"] and one["logprobs"][0] is None
        assert one["logprobs"][1:] == pytest.approx(echoed[0]["logprobs"][1:], abs=1e-4)


def test_bad_prompts_refuse_all_their_answers(tiny: Llama) -> None:
    with pytest.warns(UserWarning, match="prompt 0 has 97 tokens"):
        rows, _ = tiny.generate([[1] * 97, [1, 2]], 2, temperature=0, n=2)
    assert [len(row) for row in rows] == [0, 0, 2, 2]


def test_top_logprobs(tiny: Llama) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_gen_len": 5, "logprobs": True}
    [found] = tiny.text_completion(["Hello you"], echo=True, top_logprobs=3, **options)
    top, n = found["top_logprobs"], len(found["tokens"])
    assert top[0] is None and len(top) == n
    for i in range(n - 5, n):  # greedy: each id is the first of its alternatives
        alternatives = top[i]
        assert alternatives is not None and len(alternatives) == 3
        text, score = alternatives[0]
        assert text == found["tokens"][i] and score == pytest.approx(found["logprobs"][i])
    with tiny.text_stream("Hello you", top_logprobs=3, **options) as stream:
        pieces = list(stream)
    streamed = [one for piece in pieces for one in piece.top_logprobs]
    assert streamed == stream.generation.top_logprobs
    decode = tiny.tokenizer.decode
    for one, same in zip(streamed, top[n - 5 :], strict=True):
        assert same is not None
        assert [decode([id]) for id, _ in one] == [text for text, _ in same]
        assert [x for _, x in one] == pytest.approx([x for _, x in same], abs=1e-4)
    [chat] = tiny.chat_completion([[{"role": "user", "content": "Hi"}]], top_logprobs=1, **options)
    assert len(chat["top_logprobs"]) == len(chat["tokens"])


def test_bias_and_penalties_reach_every_method(tiny: Llama) -> None:
    """With this bias one id is always drawn."""
    word = tiny.tokenizer.encode(" word", bos=False, eos=False)[0]
    forced: dict[str, Any] = {"temperature": 0, "max_gen_len": 4, "logit_bias": {word: 100}}
    assert tiny.generate([[1, 2]], **forced)[0] == [[word] * 4]
    assert tiny.text_completion(["x"], **forced)[0]["generation"] == " word" * 4
    assert "".join(piece.text for piece in tiny.text_stream("x", **forced)) == " word" * 4
    dialog: Any = [{"role": "user", "content": "x"}]
    assert tiny.chat_completion([dialog], **forced)[0]["generation"]["content"] == " word" * 4
    assert "".join(piece.text for piece in tiny.chat_stream(dialog, **forced)) == " word" * 4
    penalties: dict[str, Any] = {"presence_penalty": 1.5, "frequency_penalty": 2}
    rows = [tiny.generate([[1, 2]], 20, 0, **more)[0][0] for more in (penalties, {})]
    request = Request([1, 2], 20, Sampling(0, **penalties), reuse=False)
    [same] = tiny.engine.run([request])
    assert rows[0] == same.ids != rows[1]


def test_a_grammar_of_your_own(tiny: Llama) -> None:
    for row in tiny.generate([[1, 2], [3]], 3, grammar=Only(9), n=2)[0]:
        assert row == [9, 9, 9]


def test_json_grammars(tiny: Llama) -> None:
    """On random weights: what ends by itself validates."""
    pytest.importorskip("llguidance")
    grammar = tiny.json_grammar(SCHEMA)
    texts = tiny.text_completion(["x"], 1.0, 1.0, max_gen_len=60, grammar=grammar, n=6, seed=0)
    ended = [t["generation"] for t in texts if t["finish_reason"] == "stop"]
    assert len(ended) == 6
    for text in ended:
        Draft202012Validator(SCHEMA).validate(json.loads(text))
    dates = tiny.regex_grammar(r"\d{4}-\d\d")
    with tiny.chat_stream([{"role": "user", "content": "x"}], grammar=dates) as stream:
        text = "".join(piece.text for piece in stream)
    assert re.fullmatch(r"\d{4}-\d\d", text) and stream.generation.finish_reason == "stop"
    with pytest.raises(ValueError, match="schema"):
        tiny.json_grammar({"type": "nonsense"})
    [any_object] = tiny.text_completion(["x"], 0, max_gen_len=4, grammar=tiny.json_grammar())
    assert any_object["generation"].startswith("{")


def test_a_time_limit(tiny: Llama) -> None:
    [answer] = tiny.text_completion(["Hello"], 0, max_gen_len=90, time_limit=1e-6)
    assert answer["finish_reason"] == "timeout" and answer["generation"] == ""
    pieces = list(tiny.text_stream("Hello", max_gen_len=9, time_limit=1e-6))
    assert [piece.finish_reason for piece in pieces] == ["timeout"]


def test_a_full_queue(tiny: Llama) -> None:
    tiny.engine.max_queue = 0
    try:
        streams = [tiny.text_stream("Hello", max_gen_len=9) for _ in range(3)]
        for stream in streams[:2]:
            next(stream)
        with pytest.raises(QueueFull, match="try again later"):
            next(streams[2])
        with pytest.raises(QueueFull):
            tiny.text_completion(["x"])
        for stream in streams:
            stream.close()
        assert tiny.text_completion(["x", "y"], max_gen_len=2)
    finally:
        tiny.engine.max_queue = None


def test_what_cannot_be_asked_for(tiny: Llama) -> None:
    for n, error in ((0, ValueError), (-1, ValueError), (True, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="n must be"):
            tiny.generate([[1]], 1, n=n)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n is not for streams"):
        tiny.text_stream("x", n=2)
    with pytest.raises(ValueError, match="top_logprobs needs logprobs=True"):
        tiny.text_completion(["x"], top_logprobs=2)
    with pytest.raises(ValueError, match="top_logprobs must be at most 20"):
        tiny.text_completion(["x"], logprobs=True, top_logprobs=21)
    with pytest.raises(ValueError, match="generate does not return top_logprobs"):
        tiny.generate([[1]], 1, logprobs=True, top_logprobs=2)
    with pytest.raises(ValueError, match="presence_penalty must lie between -2 and 2"):
        tiny.text_completion(["x"], presence_penalty=3)
    with pytest.raises(ValueError, match="logit_bias holds the token id 200000"):
        tiny.text_completion(["x"], logit_bias={200000: 1})
    with pytest.raises(TypeError, match="seed"):
        tiny.generate([[1]], 1, n=2, seed=2**64 - 1)


def test_every_method_takes_an_adapter(folder: Path, byte_tokenizer_path: Path) -> None:
    """The adapter's answers differ from the base's, and are the same by every method."""
    llama = Llama.build(folder, byte_tokenizer_path, 96, 2, device="cpu", dtype=torch.float32)
    add_adapters(llama.model, {"a": random_adapter(1, llama.model.params, rank=2, alpha=2.0)})
    more: Any = {"temperature": 0.0, "max_gen_len": 12, "adapter": "a"}
    [whole] = llama.text_completion(["Hello"], **more)
    [base] = llama.text_completion(["Hello"], **more | {"adapter": None})
    assert whole["generation"] != base["generation"]
    prompt = llama.tokenizer.encode("Hello", bos=True, eos=False)
    [ids], scores = llama.generate([prompt], logprobs=True, echo=True, **more)
    assert llama.tokenizer.decode(ids[len(prompt) :]) == whole["generation"] and scores is not None
    stream = llama.text_stream("Hello", **more)
    assert "".join(piece.text for piece in stream) == whole["generation"]

    async def read() -> str:
        return "".join([piece.text async for piece in llama.text_stream_async("Hello", **more)])

    assert asyncio.run(read()) == whole["generation"]
    [scored], [plain] = llama.score(["Hello"], adapter="a"), llama.score(["Hello"])
    logprobs: list[Any] = scored["logprobs"]
    assert logprobs[1:] == pytest.approx(scores[0][1 : len(prompt)], abs=1e-4)
    assert logprobs != plain["logprobs"]
    nats = llama.perplexity("Hello", adapter="a").nats
    assert nats == pytest.approx(-sum(logprobs[1:]), abs=1e-4)
    for call in (llama.text_completion, llama.score):
        with pytest.raises(ValueError, match="no adapter 'b'; use one of a, or None"):
            call(["Hello"], adapter="b")


@pytest.mark.parametrize("adapters", ["a", ["a"], {"": "folder"}, {1: "folder"}])
def test_adapters_need_names(adapters: Any) -> None:
    with pytest.raises(TypeError, match="adapters must be a dict of names and folders"):
        BuildOptions(adapters=adapters)


def test_adapters_to_choose_from_are_not_compiled() -> None:
    with pytest.raises(ValueError, match="leave compile out, or build with one adapter="):
        BuildOptions(adapters={"a": "folder"}, compile=True)
