"""Computes a `Trace`: one pass over a prompt on a plain copy of a loaded model."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llama.distributed import tensor_parallel
from llama.engine.checks import check_adapter, check_count, check_prompt
from llama.engine.sampling import Sampling
from llama.explain.hooks import attach_hooks, lens_of
from llama.explain.next_token import next_token
from llama.explain.skeleton import plain_copy
from llama.explain.stages import stages_of
from llama.explain.trace import Trace
from llama.layers.adapter_rows import adapter_names
from llama.model import ModelArgs, Transformer, precompute_freqs_cis
from llama.tokenizer import Tokenizer

log = logging.getLogger("llama")
MAX_TOKENS = 256  # tokens of a prompt that are computed
LONGEST = 4096  # the largest max_tokens
MAX_BYTES = 2**31  # of all layers' attention weights and of the logits
ONE_RANK = (
    "explain runs on one rank, because each of several has only a part of the heads; start one "
    "process, without torchrun"
)


def trace_ids(
    model: Transformer,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    sampling: Sampling,
    *,
    max_tokens: int = MAX_TOKENS,
    adapter: str | None = None,
    name: str = "",
) -> Trace:
    """Compute a prompt on a plain copy of the model, and keep what it computes.

    The model gets no hooks and its caches are not touched, so an engine may run it meanwhile.

    Args:
        ids: of the prompt. Of a longer one than `max_tokens`, the first are computed: a token sees
            only those before it, so these have the numbers that they have in the whole prompt.
        name: of the checkpoint.

    Raises:
        TypeError, ValueError: no such prompt or adapter; several ranks; logits that are not finite.
    """
    check_explainable(ids, model.vocab_size)
    check_adapter(adapter, adapter_names(model))
    args, total = model.params, len(ids)
    room, limit = token_limit(args, max_tokens)
    ids = [int(i) for i in ids[:room]]
    if total > room:
        log.warning("Of the prompt's %d tokens, only the first %d are explained", total, room)
    copy = plain_copy(model, adapter, len(ids))
    collected = attach_hooks(copy)
    logits = logits_of(copy, ids)
    lens_ids, lens_probs = lens_of(copy, collected.tensors["residual"])
    check_finite(lens_probs)
    return Trace(
        **token_fields(tokenizer, ids),
        **rotation_fields(args, len(ids)),
        **collected.tensors,
        total=total,
        limit=limit if total > room else "",
        name=name,
        args=dataclasses.replace(args),
        dtype=model.norm.weight.dtype,
        lens_ids=lens_ids,
        lens_probs=lens_probs,
        logits=logits,
        logprobs=logprobs_of(logits, ids),
        stages=stages_of(copy, collected.shapes, len(ids)),
        next=next_token(logits[-1], sampling, model.unused),
    )


def check_explainable(ids: Sequence[int], vocab_size: int) -> None:
    """Raise a TypeError or a ValueError unless this rank is alone and these are a prompt's ids."""
    if tensor_parallel.size() > 1:
        raise ValueError(ONE_RANK)
    if isinstance(ids, bytes) or not isinstance(ids, Sequence):
        found = [f"; give its .{name}()" for name in ("tolist", "decode") if hasattr(ids, name)]
        raise TypeError(
            "a prompt is a text, a dialog (a list of messages) or a list of token ids, and not "
            f"{type(ids).__name__}{''.join(found[:1])}"
        )
    check_prompt("the prompt", ids)
    if not ids:
        raise ValueError("the prompt has no tokens; give at least one")
    if wrong := [i for i in ids if not 0 <= i < vocab_size]:
        raise ValueError(f"no token has the id {wrong[0]}; use 0 to {vocab_size - 1}")


def check_text(prompt: str) -> None:
    """Raise a ValueError for lone surrogates, which no token has."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(
            f"the prompt is not text in UTF-8: character {e.start} is a lone surrogate"
        ) from None


def check_max_tokens(value: int) -> None:
    """Raise a TypeError or a ValueError unless so many tokens may be asked for."""
    if not 1 <= check_count("max_tokens", value) <= LONGEST:
        raise ValueError(f"max_tokens must be 1 to {LONGEST}, not {value}")


def token_limit(args: ModelArgs, max_tokens: int) -> tuple[int, str]:
    """How many tokens can be explained, and what to change to explain more."""
    check_max_tokens(max_tokens)
    # The largest T with 4 (L H T^2 + V T) <= MAX_BYTES.
    a, b, c = args.n_layers * args.n_heads, args.vocab_size, MAX_BYTES // 4
    memory = (math.isqrt(b * b + 4 * a * c) - b) // (2 * a)
    return min(
        (max_tokens, "raise max_tokens to see more"),
        (args.max_seq_len, "build with a larger max_seq_len to see more"),
        (max(memory, 1), "more would need over 2 GB for weights of attention and logits"),
        key=lambda limit: limit[0],
    )


@torch.no_grad()
def logits_of(model: Transformer, ids: list[int]) -> Tensor:
    """(T, V) fp32 on the CPU.

    Raises:
        ValueError: they are not finite.
    """
    tokens = torch.tensor([ids], device=model.norm.weight.device)
    logits: Tensor = model(tokens).squeeze(0).cpu()
    check_finite(logits)
    return logits


def check_finite(found: Tensor) -> None:
    """Raise a ValueError unless all numbers are finite."""
    if not bool(found.isfinite().all()):
        raise ValueError(
            "the model's logits are not finite numbers; build it with dtype='fp32', and check the "
            "checkpoint with `llama3 verify`"
        )


def logprobs_of(logits: Tensor, ids: list[int]) -> Tensor:
    """(T,) log p(token | tokens before it); NaN for the first."""
    following = torch.tensor(ids[1:], dtype=torch.int64).unsqueeze(1)
    before = logits[:-1]
    known = before.gather(-1, following).squeeze(1) - before.logsumexp(-1)
    return torch.cat([torch.full((1,), math.nan, dtype=torch.float32), known])


def token_fields(tokenizer: Tokenizer, ids: list[int]) -> dict[str, Any]:
    """Fields of a `Record` about the tokens."""
    special = frozenset(tokenizer.special_tokens.values())
    return {
        "ids": ids,
        "pieces": [tokenizer.decode_bytes([i]) for i in ids],
        "special": [i in special for i in ids],
        "decode": tokenizer.decode_bytes,
    }


def rotation_fields(args: ModelArgs, tokens: int) -> dict[str, Any]:
    """Fields of a `Record` about rotations."""
    fields: dict[str, Any] = {}
    for prefix, scaled in (("", args.use_scaled_rope), ("unscaled_", False)):
        turns = precompute_freqs_cis(
            args.head_dim,
            max(tokens, 2),
            args.rope_theta,
            use_scaled=scaled,
            scale_factor=args.scale_factor,
        )
        fields[f"{prefix}rotations"] = turns[:tokens]
        fields[f"{prefix}frequencies"] = turns[1].angle()
    return fields
