"""Hugging Face's config.json and tensor names <-> Meta's params.json and names. Reads no tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama.checkpoints.formats.params import ffn_terms
from llama.model import ModelArgs

INDEX_FILE = "model.safetensors.index.json"
# Hugging Face's name: Meta's. Names in a layer follow `model.layers.N.` (HF), `layers.N.` (Meta).
TOP_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
}
LAYER_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\.(.+)")
_WRAPPED = re.compile(r"^(module\.|_orig_mod\.)+")  # of a model saved by data parallel or compiled
# Keys that change what the weights compute, with the only value that Meta's models have.
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
# Constants of Llama 3.1's RoPE scaling.
SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def meta_name(name: str) -> str | None:
    """Meta's name of the HF tensor `name`; None: Meta's models have no such tensor."""
    name = _WRAPPED.sub("", name)
    stem = name.removesuffix(".weight")
    if stem == name:
        return None
    if layer := _LAYER.fullmatch(stem):
        found = LAYER_NAMES.get(layer[2])
        return f"layers.{layer[1]}.{found}.weight" if found else None
    return f"{TOP_NAMES[stem]}.weight" if stem in TOP_NAMES else None


def hf_name(name: str) -> str:
    """HF's name of Meta's weight `name`."""
    prefix, names = "", TOP_NAMES
    stem = name.removesuffix(".weight")
    if stem.startswith("layers."):
        _, layer, stem = stem.split(".", 2)
        prefix, names = f"model.layers.{layer}.", LAYER_NAMES
    return prefix + next(hf for hf, meta in names.items() if meta == stem) + ".weight"


def read_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The content of params.json that says the same as `config`; `path` is for messages.

    Raises:
        ValueError: a key is missing, or the model does not compute what Meta's code computes.
    """

    def count(key: str, default: int | None = None) -> int:
        value = config.get(key) if config.get(key) is not None else default
        if type(value) is not int or value < 1:
            raise ValueError(f"{path}: {key} must be a positive integer, not {value!r}")
        return value

    if config.get("model_type") != "llama":
        kind = config.get("model_type")
        raise ValueError(f"{path}: model_type is {kind!r}; only 'llama' can be loaded")
    dim, n_heads = count("hidden_size"), count("num_attention_heads")
    for key, fixed in (FIXED | {"head_dim": dim // n_heads}).items():
        if (value := config.get(key, fixed)) not in (fixed, None):
            raise ValueError(f"{path}: {key} is {value!r}; Meta's models have {fixed!r} here")
    if config.get("quantization_config") is not None:
        raise ValueError(f"{path}: the weights are quantized; use the unquantized model")
    if "AutoModelForCausalLM" in (config.get("auto_map") or {}):
        raise ValueError(
            f"{path}: auto_map names model code in the repository, which this library never runs"
        )
    try:
        multiple_of, multiplier = ffn_terms(dim, count("intermediate_size"))
        params: dict[str, Any] = {
            "dim": dim,
            "n_layers": count("num_hidden_layers"),
            "n_heads": n_heads,
            "n_kv_heads": count("num_key_value_heads", n_heads),
            "vocab_size": count("vocab_size"),
            "multiple_of": multiple_of,
            "ffn_dim_multiplier": multiplier,
            "norm_eps": config.get("rms_norm_eps", 1e-6),  # the default of Hugging Face's class
            **_rope(config),
        }
        ModelArgs(**params)
    except ValueError as e:
        text = str(e)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    return params


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and the scaling; transformers 5 stores both in one object, 4 does not."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"the RoPE parameters must be an object, not {rope!r}")
    for holder in (config, rope):
        if holder.get("partial_rotary_factor", 1) not in (1, None):
            raise ValueError("partial_rotary_factor is not 1: only part of a head is rotated")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        raise ValueError(f"RoPE scaling is of type {kind!r}; only 'llama3' and 'default' are known")
    for key, fixed in SCALING.items():
        if rope.get(key) != fixed:
            raise ValueError(
                f"RoPE scaling has {key} {rope.get(key)!r}; Meta's models have {fixed} here"
            )
    if rope.get("factor") is None:
        raise ValueError("RoPE scaling has no factor")
    return {"rope_theta": theta, "use_scaled_rope": True, "rope_scale_factor": rope["factor"]}
