"""What the tests of bodies and replies share: bodies, and answers that are scripted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from llama import Llama
from llama.engine.engine import Engine
from llama.engine.request import FinishReason, Generation, Request
from llama.engine.sampling import Sampling
from llama.generation import Answer, Piece
from llama.server.chat_body import parse_chat
from llama.server.completion_body import parse_completion
from llama.server.replies import ChatReply, CompletionReply
from llama.server.requests import chat_prompt, chat_requests, completion_requests
from llama.text.detokenizer import Detokenizer
from llama.tokenizer import Tokenizer

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}


def small_llama(folder: Path, tokenizer: Path) -> Llama:
    """A checkpoint on the CPU, with another tokenizer."""
    return Llama.build(folder, tokenizer, 256, 2, device="cpu", dtype="fp32")


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HELLO, **fields}


def asked(content: str | None, *calls: tuple[str, str]) -> dict[str, Any]:
    """An assistant's message with calls (name, arguments), whose ids are a, b, ..."""
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {
                "id": "abcdefgh"[k],
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for k, (name, arguments) in enumerate(calls)
        ],
    }


def result(call: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call, "content": content}


def scripted(
    tokenizer: Tokenizer,
    request: Request,
    ids: Sequence[int],
    *,
    stop: Sequence[str] = (),
    step: int = 1,
    reason: FinishReason = "stop",
) -> Iterator[tuple[Answer, Piece]]:
    """An answer of these ids, read after every `step` of them, by the classes that read any."""
    generation = Generation(request)
    generation.begin(1, 10**6)
    answer = Answer(cast(Engine, None), generation, Detokenizer(tokenizer.decode_bytes, stop))
    for i, token in enumerate(ids):
        generation.append(token, -0.5 - i, [(token, -0.5 - i)])
        if i % step == 0 and (piece := answer.read()) is not None:
            yield answer, piece
    generation.finish_reason = generation.finish_reason or reason
    if (piece := answer.read()) is not None:
        yield answer, piece


def chat_reply(llama: Llama, data: dict[str, Any]) -> tuple[ChatReply, list[Request]]:
    body = parse_chat(data)
    groups = chat_requests(llama, body, chat_prompt(llama, body), None, Sampling())
    return ChatReply(llama.tokenizer, body, groups, "tiny"), groups[0]


def completion_reply(llama: Llama, data: dict[str, Any]) -> tuple[CompletionReply, list[Request]]:
    body = parse_completion(data)
    groups = completion_requests(llama, body, Sampling())
    reply = CompletionReply(llama.tokenizer, body, groups, "tiny")
    return reply, [request for group in groups for request in group]
