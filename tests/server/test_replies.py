"""Chunks and whole replies. Oracles: the openai package's types, and its own fold of chunks."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from llama import Llama
from llama.generation import Answer, Piece
from llama.server.logprobs import TokenAligner, completion_token, finite
from llama.server.replies import DONE, ChatReply, CompletionReply, event
from llama.text.detokenizer import Detokenizer
from tests.server.wire_cases import (
    HELLO,
    WEATHER,
    chat_reply,
    completion_reply,
    scripted,
)

EMOJI = "Tea \U0001f375 for \U0001f468\u200d\U0001f469\u200d\U0001f467, na\u00efve \u4e2d\u6587."


@pytest.fixture
def llama(tiny_llama: Llama) -> Llama:
    return tiny_llama


def encoded(llama: Llama, text: str) -> list[int]:
    return llama.tokenizer.encode(text, bos=False)


def answered(
    llama: Llama,
    reply: ChatReply | CompletionReply,
    requests: Sequence[Any],
    *texts: str,
    **how: Any,
) -> list[dict[str, Any]]:
    """All chunks of a reply whose answers are these texts, generated in turns."""
    chunks = reply.first()
    parts = [
        scripted(llama.tokenizer, request, encoded(llama, text), **how)
        for request, text in zip(requests, texts, strict=True)
    ]
    for step in itertools.zip_longest(*parts):
        for index, got in enumerate(step):
            if got is not None:
                chunks += reply.piece(index, *got)
    return chunks + reply.end()


def test_a_chat_stream_is_what_clients_expect(llama: Llama) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 50}
    reply, requests = chat_reply(llama, {"messages": HELLO, **options})
    chunks = answered(llama, reply, requests, EMOJI)
    first, *middle, last, usage = chunks
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    for chunk in middle:
        assert set(chunk["choices"][0]["delta"]) == {"content"}
        assert chunk["choices"][0]["finish_reason"] is None
    assert last["choices"][0]["delta"] == {}
    assert last["choices"][0]["finish_reason"] == "stop"
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert usage["choices"] == []
    prompt, n = len(requests[0].prompt), len(encoded(llama, EMOJI))
    assert usage["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": n,
        "total_tokens": prompt + n,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_stream_without_usage_has_none(llama: Llama) -> None:
    cases: list[dict[str, Any]] = [{}, {"stream_options": {}}]
    for options in cases:
        reply, requests = chat_reply(llama, {"messages": HELLO, "stream": True, **options})
        chunks = answered(llama, reply, requests, "Hi")
        assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


def test_continuous_usage_counts_up(llama: Llama) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    data = {"messages": HELLO, "stream": True, "stream_options": options}
    reply, requests = chat_reply(llama, data)
    counts = [c["usage"]["completion_tokens"] for c in answered(llama, reply, requests, EMOJI)]
    assert counts == sorted(counts) and counts[0] == 0
    assert counts[-1] == len(encoded(llama, EMOJI))


@pytest.mark.parametrize("step", [1, 3, 100])
def test_the_whole_reply_is_what_a_client_folds(llama: Llama, step: int) -> None:
    data = {"messages": HELLO, "n": 3, "logprobs": True, "stream": True}
    reply, requests = chat_reply(llama, data)
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    texts = [EMOJI, "", "Two\n\nlines"]
    for chunk in answered(llama, reply, requests, *texts, step=step):
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    folded, whole = (
        state.get_final_completion(),
        ChatCompletion.model_validate(reply.whole(), strict=True),
    )
    assert [c.message.content for c in whole.choices] == texts
    for one, other in zip(folded.choices, whole.choices, strict=True):
        assert one.message.content == other.message.content
        assert one.message.role == other.message.role
        assert one.finish_reason == other.finish_reason == "stop"
        entries = other.logprobs and other.logprobs.content
        assert ((one.logprobs and one.logprobs.content) or []) == entries
    usage = reply.whole()["usage"]
    assert usage["prompt_tokens"] == len(requests[0].prompt)  # once for three answers
    assert usage["completion_tokens"] == sum(len(encoded(llama, text)) for text in texts)


@pytest.mark.parametrize("seed", range(40))
def test_bytes_of_logprobs_are_the_text(llama: Llama, seed: int) -> None:
    """At every split, with and without a stop string, which may cut a token or a character."""
    rng = random.Random(seed)
    alphabet = ["a", " the", "\n", "\U0001f600", "\u00e9", "\u4e2d", ", and", "\u2003", "STOP"]
    text = "".join(rng.choices(alphabet, k=20))
    stop = rng.choice([[], ["STOP"], [text[9:12]], ["\U0001f600"], ["the a", "\u00e9"]])
    data = {"messages": HELLO, "logprobs": True, "stream": True}
    reply, requests = chat_reply(llama, data | ({"stop": stop} if stop else {}))
    chunks = answered(llama, reply, requests, text, stop=stop, step=rng.randint(1, 4))
    cuts = [text.find(s) for s in stop if s in text]
    [choice] = reply.whole()["choices"]
    assert choice["message"]["content"] == text[: min(cuts, default=None)]
    entries = choice["logprobs"]["content"]
    joined = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert joined.decode() == choice["message"]["content"]
    assert all(entry["token"] and "\ufffd" not in entry["token"] for entry in entries)
    sent = ""
    for chunk in chunks:  # and no entry comes before its text, nor after it
        part = chunk["choices"][0]
        sent += part["delta"].get("content") or ""
        entries = (part["logprobs"] or {"content": []})["content"]
        joined = joined.removeprefix(b"".join(bytes(entry["bytes"]) for entry in entries))
        assert (sent.encode() + joined).decode(errors="ignore").startswith(sent)
    assert sent.encode() == choice["message"]["content"].encode() and not joined


def test_a_merged_piece_is_read_before_the_stop_string(llama: Llama) -> None:
    """The runtime reads ahead of a slow client: the answer has stopped, the piece has not."""
    ids = encoded(llama, "one two three STOP")
    aligner, tokens = TokenAligner(llama.tokenizer.decode_bytes), []
    for piece in (Piece("one", ids[:2], [0, 0]), Piece(" two three ", ids[2:], [0] * 9, "stop")):
        piece.logprobs = piece.logprobs[: len(piece.tokens)]
        tokens += aligner.feed(piece, stopped=True)
    assert b"".join(token.bytes for token in tokens) == b"one two three "


def test_bytes_that_are_no_text_are_shown(llama: Llama) -> None:
    """Ids of half a character, then others."""
    half = [next(i for b, i in llama.tokenizer.ranks.items() if b == b"\xf0")]
    ids = [*half, *encoded(llama, "a"), *half]
    reply, [request] = chat_reply(llama, {"messages": HELLO, "logprobs": True})
    for got in scripted(llama.tokenizer, request, ids, reason="length"):
        reply.piece(0, *got)
    [choice] = reply.whole()["choices"]
    assert choice["message"]["content"] == "\ufffda\ufffd"
    entries = choice["logprobs"]["content"]
    assert [(e["token"], e["bytes"], e["id"]) for e in entries] == [
        ("\\xf0", [0xF0], ids[0]), ("a", [97], ids[1]), ("\\xf0", [0xF0], ids[2]),
    ]  # fmt: skip
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("content", ["Look:", None])
def test_tool_calls_are_folded_as_the_client_does(llama: Llama, content: str | None) -> None:
    text = (content or "") + '<function=get_weather>{"city": "Oslo"}</function>'
    data = {"messages": HELLO, "tools": [WEATHER], "logprobs": True, "stream": True}
    reply, requests = chat_reply(llama, data)
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    for chunk in answered(llama, reply, requests, text):
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk, strict=True))
    folded = state.get_final_completion().choices[0]
    whole = ChatCompletion.model_validate(reply.whole(), strict=True).choices[0]
    assert whole.message.content == content
    assert folded.finish_reason == whole.finish_reason == "tool_calls"
    assert whole.message.tool_calls and folded.message.tool_calls
    [one], [other] = whole.message.tool_calls, folded.message.tool_calls
    assert one.type == "function" and other.type == "function" and one.id == other.id
    assert json.loads(one.function.arguments) == {"city": "Oslo"}
    assert one.function.arguments == other.function.arguments
    assert whole.logprobs and whole.logprobs.content  # of the whole text, call included
    assert b"".join(bytes(e.bytes or ()) for e in whole.logprobs.content).decode() == text


def test_tools_that_must_not_be_called_are_content(llama: Llama) -> None:
    text = '{"type": "function", "name": "get_weather", "parameters": {"city": "Oslo"}}'
    for choice, called in (("none", 0), ("auto", 1)):
        data = {"messages": HELLO, "tools": [WEATHER], "tool_choice": choice}
        reply, requests = chat_reply(llama, data)
        answered(llama, reply, requests, text)
        [whole] = reply.whole()["choices"]
        assert len(whole["message"].get("tool_calls", ())) == called
        assert whole["finish_reason"] == ("tool_calls" if called else "stop")


def test_an_answer_that_a_format_constrains_is_no_call(llama: Llama) -> None:
    text = '{"name": "get_weather", "parameters": {"city": "Oslo"}}'
    data = {"messages": HELLO, "tools": [WEATHER], "response_format": {"type": "json_object"}}
    reply, requests = chat_reply(llama, data)
    answered(llama, reply, requests, text)
    [choice] = reply.whole()["choices"]
    assert choice["message"]["content"] == text and choice["finish_reason"] == "stop"


def test_completions_of_two_prompts(llama: Llama) -> None:
    data = {"prompt": ["One", "Two"], "n": 2, "logprobs": 2, "max_tokens": 40}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    texts = [EMOJI, " b", " c d e", ""]
    reply, requests = completion_reply(llama, data | stream)
    assert [request.seed for request in requests] == [None] * 4
    chunks = answered(llama, reply, requests, *texts)
    joined = ["", "", "", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            joined[choice["index"]] += choice["text"]
    assert joined == texts
    assert chunks[-1]["usage"] == reply.whole()["usage"]
    whole = Completion.model_validate(reply.whole(), strict=True)
    assert [choice.text for choice in whole.choices] == texts
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == sum(len(r.prompt) for r in requests[::2])
    assert whole.usage.completion_tokens == sum(len(encoded(llama, text)) for text in texts)


@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_scores_the_prompt(llama: Llama, as_ids: bool) -> None:
    """The tokens are those of the text at their offsets; the first has no log-probability."""
    ids = llama.tokenizer.encode(EMOJI, bos=not as_ids)
    data = {"prompt": ids if as_ids else EMOJI, "echo": True, "logprobs": 2, "max_tokens": 4}
    reply, requests = completion_reply(llama, data | {"n": 2})
    assert {request.score_from for request in requests} == {0}
    assert {tuple(request.prompt) for request in requests} == {tuple(ids)}
    for index, generation in enumerate(llama.engine.run(requests)):
        answer = Answer(llama.engine, generation, Detokenizer(llama.tokenizer.decode_bytes))
        while (piece := answer.read()) is not None:
            reply.piece(index, answer, piece)
        choice = reply.whole()["choices"][index]
        assert choice["text"] == EMOJI + answer.text
        lists = choice["logprobs"]
        assert len({len(values) for values in lists.values()}) == 1
        assert lists["token_logprobs"][0] is None and lists["top_logprobs"][0] is None
        expected = [*scores_of_a_forward(llama, ids), *answer.logprobs]
        assert lists["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
        for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
            if not token.startswith(("bytes:", "<|begin_of_text|>")):
                assert choice["text"][offset:].startswith(token)
        for i, top in enumerate(lists["top_logprobs"][1:], 1):  # the token's own, and two
            own = lists["token_logprobs"][i]
            assert top[lists["tokens"][i]] == own and len(top) in (2, 3)
            assert sum(value > own for value in top.values()) <= 2


def scores_of_a_forward(llama: Llama, ids: list[int]) -> list[float]:
    """Log-probabilities of a prompt's ids but the first, from the logits of a plain forward."""
    with torch.inference_mode():
        logits = llama.model(torch.tensor([ids]))
    scores = torch.log_softmax(logits[0, :-1], -1)
    return [float(scores[i, id]) for i, id in enumerate(ids[1:])]


def test_echo_alone_generates_nothing(llama: Llama) -> None:
    data = {"prompt": "A b", "echo": True, "max_tokens": 0}
    reply, [request] = completion_reply(llama, data)
    assert request.max_gen_len == 0 and request.score_from is None
    chunks = answered(llama, reply, [request], "", reason="length")
    assert [c["choices"][0]["text"] for c in chunks] == ["A b", ""]
    assert reply.whole()["choices"][0]["finish_reason"] == "length"


def test_numbers_that_json_lacks() -> None:
    assert [finite(x) for x in (-0.5, float("-inf"), float("nan"))] == [-0.5, -9999.0, -9999.0]
    assert completion_token(b" \xe2\x80") == "bytes:\\x20\\xe2\\x80"


def test_events_are_ascii_lines() -> None:
    data = event({"text": "\u2028\u00e9\n\r"})
    assert data == b'data: {"text":"\\u2028\\u00e9\\n\\r"}\n\n' and DONE == b"data: [DONE]\n\n"


def test_cached_prompt_tokens_are_the_engines(llama: Llama) -> None:
    """Of the first answer to each prompt: its siblings copy what it has."""
    llama.engine.forget()
    data = {"prompt": ["One two three four", "Five six"], "n": 2, "max_tokens": 2}
    cached = []
    for _ in range(2):
        reply, requests = completion_reply(llama, data)
        generations = llama.engine.run(requests)
        for index, generation in enumerate(generations):
            answer = Answer(llama.engine, generation, Detokenizer(llama.tokenizer.decode_bytes))
            while (piece := answer.read()) is not None:
                reply.piece(index, answer, piece)
        usage = reply.whole()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        assert cached[-1] == sum(generation.reused for generation in generations[::2])
        assert usage["prompt_tokens"] == sum(len(request.prompt) for request in requests[::2])
        assert usage["completion_tokens"] == sum(len(generation.ids) for generation in generations)
    assert cached[0] <= 1 and cached[1] == usage["prompt_tokens"] - 2  # all but the last of each
