"""The names by which requests choose the base or an adapter, and their entries in /v1/models."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from llama.engine.sampling import Sampling
from llama.generation import Llama
from llama.layers.adapter_rows import adapter_names
from llama.server.errors import ApiError, quoted


def served_names(llama: Llama, base: str) -> tuple[str, ...]:
    """The base's name, then those of its adapters."""
    return (base, *adapter_names(llama.model))


def check_model(model: str | None, llama: Llama, base: str) -> str:
    """The name of the model that answers a request: the one that it names, or the base.

    Raises:
        ApiError: 404, it names another model.
    """
    names = served_names(llama, base)
    if model is None:
        return base
    if model not in names:
        known = ", ".join(map(quoted, names))
        raise ApiError(
            404,
            f"the model {quoted(model)} is not served here; use {'one of ' * (len(names) > 1)}"
            f"{known}",
            param="model",
            code="model_not_found",
        )
    return model


def describe_model(
    llama: Llama, name: str, base: str, *, started: int, defaults: Sampling
) -> dict[str, Any]:
    """The entry of the base or an adapter."""
    return {
        "id": name,
        "object": "model",
        "created": started,
        "owned_by": "llama3",
        "root": base,
        "parent": None if name == base else base,
        "max_model_len": llama.engine.room,
        "defaults": asdict(defaults),
        "chat": llama.formatter is not None,
        "stop_tokens": sorted(llama.tokenizer.stop_tokens),
        "dtype": str(llama.model.norm.weight.dtype).removeprefix("torch."),
        "quantize": stored_scheme(llama),
    }


def stored_scheme(llama: Llama) -> str | None:
    """How the weights of the layers are stored: "int8", "int4", or None."""
    linear = llama.model.get_submodule("layers.0.attention.wq")
    linear = getattr(linear, "base", linear)  # of an adapter
    return getattr(linear, "scheme", None)
