"""Bodies -> requests of the engine."""

from __future__ import annotations

import dataclasses
from typing import Any

from llama.engine.grammar import Grammar
from llama.engine.request import Request
from llama.engine.sampling import Sampling
from llama.generation import Llama
from llama.layers.adapter_rows import adapter_names
from llama.server.chat_body import ChatBody
from llama.server.common_body import CommonBody
from llama.server.completion_body import CompletionBody
from llama.server.prompts import chat_prompt, check_ids, check_room, text_prompt

__all__ = ["chat_prompt", "chat_requests", "completion_requests"]

_SAMPLED = [field.name for field in dataclasses.fields(Sampling)]


def chat_requests(
    llama: Llama,
    body: ChatBody,
    prompt: list[int],
    grammar: Grammar | None,
    defaults: Sampling,
) -> list[list[Request]]:
    """One group of siblings: the `n` answers to a dialog.

    Args:
        prompt: see `chat_prompt`.
        grammar: that the answers must match, or None.
        defaults: sampling where the body sets none.
    """
    fields = _fields(llama, body, defaults) | {
        "max_gen_len": body.most_tokens,
        "logprobs": body.logprobs,
        "top_logprobs": body.top_logprobs or 0,
        "grammar": grammar,
    }
    if grammar is not None:  # which says where the answer ends, also with `ignore_eos`
        fields["stop_tokens"] = llama.tokenizer.stop_tokens
    return [_siblings(prompt, body, fields | {"name": "the dialog"})]


def completion_requests(
    llama: Llama, body: CompletionBody, defaults: Sampling
) -> list[list[Request]]:
    """A group of siblings for each prompt, in order. May take long for long texts.

    Raises:
        ApiError: a prompt is too long, or has an id that the model lacks.
    """
    fields = _fields(llama, body, defaults) | {
        "max_gen_len": body.max_tokens,
        "logprobs": body.logprobs is not None,
        "top_logprobs": body.logprobs or 0,
        "score_from": 0 if body.echo and body.logprobs is not None else None,
    }
    groups = []
    for i, given in enumerate(body.prompt):
        prompt = text_prompt(llama, given)
        check_room(llama, len(prompt), min(body.max_tokens, 1), "prompt")
        groups.append(_siblings(prompt, body, fields | {"name": f"prompt {i}"}))
    return groups


def _fields(llama: Llama, body: CommonBody, defaults: Sampling) -> dict[str, Any]:
    """Fields of `Request` that chat and completions share."""
    given = {name: getattr(body, name) for name in _SAMPLED}
    given = {name: value for name, value in given.items() if value is not None}
    if "top_k" in given:
        given["top_k"] = max(0, given["top_k"])  # -1 is "no limit" elsewhere
    check_ids(llama, list(body.logit_bias or ()), "logit_bias")
    return {
        "sampling": dataclasses.replace(defaults, **given),
        "logit_bias": body.logit_bias or {},
        "stop_tokens": () if body.ignore_eos else llama.tokenizer.stop_tokens,
        "adapter": body.model if body.model in adapter_names(llama.model) else None,
    }


def _siblings(prompt: list[int], body: CommonBody, fields: dict[str, Any]) -> list[Request]:
    """Requests for the `n` answers; answer j has the seed + j."""
    return [
        Request(prompt, seed=None if body.seed is None else body.seed + j, **fields)
        for j in range(body.n)
    ]
