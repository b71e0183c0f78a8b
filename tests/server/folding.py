"""What a client makes of a reply: the same data from a stream and from a whole body."""

from __future__ import annotations

from typing import Any

import openai


def ask(client: openai.OpenAI, request: dict[str, Any], stream: bool) -> dict[str, Any]:
    """A reply to a request of chat or of text: {"choices": [...], "usage": {...}}.

    Texts, ids, log-probabilities, calls and reasons are in the same places for both kinds of
    reply. The ids of calls are left out.
    """
    if "prompt" in request and (stream or request.get("echo")):
        # Its types have no null where OpenAI's own service sends it.
        client = openai.OpenAI(base_url=client.base_url, api_key=client.api_key, max_retries=0)
    api: Any = client.chat.completions if "messages" in request else client.completions
    if not stream:
        reply = api.create(**request)
        choices = [_choice(choice) for choice in reply.choices]
        return {"choices": choices, "usage": _usage(reply.usage)}
    found: dict[int, dict[str, Any]] = {}
    usage: Any = None
    options = {"include_usage": True}
    for chunk in api.create(**request, stream=True, stream_options=options):
        assert usage is None, "the chunk with the usage is the last"
        usage = chunk.usage
        assert bool(chunk.choices) != bool(chunk.usage)
        for choice in chunk.choices:
            _add(found.setdefault(choice.index, _empty()), choice)
    return {"choices": [found[i] for i in sorted(found)], "usage": _usage(usage)}


def _empty() -> dict[str, Any]:
    return {"text": "", "calls": [], "logprobs": [], "finish_reason": None}


def _usage(usage: Any) -> tuple[int, int, int]:
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def _choice(choice: Any) -> dict[str, Any]:
    """A choice of a whole reply."""
    message = getattr(choice, "message", None)
    calls = [call.function for call in (message.tool_calls or [])] if message else []
    return {
        "text": (message.content or "") if message else choice.text,
        "calls": [(call.name, call.arguments) for call in calls],
        "logprobs": _logprobs(choice),
        "finish_reason": choice.finish_reason,
    }


def _add(sum_: dict[str, Any], choice: Any) -> None:
    """Add a chunk's choice."""
    assert sum_["finish_reason"] is None, "nothing follows the reason"
    delta = getattr(choice, "delta", None)
    sum_["text"] += (delta.content or "") if delta else choice.text
    for call in (delta.tool_calls or []) if delta else []:
        if call.id is not None:
            assert call.index == len(sum_["calls"])
            sum_["calls"].append((call.function.name, ""))
        name, arguments = sum_["calls"][call.index]
        sum_["calls"][call.index] = name, arguments + call.function.arguments
    sum_["logprobs"] += _logprobs(choice)
    sum_["finish_reason"] = choice.finish_reason


def _logprobs(choice: Any) -> list[Any]:
    """A tuple for each token."""
    if choice.logprobs is None:
        return []
    if hasattr(choice.logprobs, "content"):
        return [
            (entry.id, entry.token, entry.bytes, entry.logprob, _top(entry.top_logprobs))
            for entry in choice.logprobs.content or []
        ]
    found = choice.logprobs
    lists = found.tokens, found.token_logprobs, found.top_logprobs, found.text_offset
    return list(zip(*lists, strict=True))


def _top(entries: Any) -> list[Any]:
    return [(entry.id, entry.token, entry.logprob) for entry in entries]
