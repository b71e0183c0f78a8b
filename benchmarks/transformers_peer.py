"""transformers' LlamaForCausalLM with this library's weights. Knows its config and its cache.

Shapes: B rows, T ids in a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llama.checkpoints.formats.hf_config import hf_name
from llama.checkpoints.formats.hf_export import halve
from llama.model import ModelArgs, Transformer


def config_of(args: ModelArgs) -> Any:
    """The LlamaConfig of a model."""
    from transformers import LlamaConfig

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.use_scaled_rope:
        rope |= {"rope_type": "llama3", "factor": args.scale_factor, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.dim,
        intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=131072,
        rms_norm_eps=args.norm_eps,
        rope_parameters=rope,
    )


def transformers_weights(ours: Transformer) -> dict[str, Tensor]:
    """The weights under transformers' names; rows of queries and keys in its RoPE order."""
    return {
        hf_name(name): halve(w, ours.params.head_dim) if name.split(".")[-2] in ("wq", "wk") else w
        for name, w in ours.state_dict().items()
    }


def transformers_model(ours: Transformer) -> nn.Module:
    """A model in training mode with copies of the weights, on the same device."""
    from transformers import LlamaForCausalLM

    theirs: nn.Module = LlamaForCausalLM(config_of(ours.params))
    theirs.to(ours.norm.weight.device)
    theirs.load_state_dict(transformers_weights(ours), strict=True)
    return theirs.train()


def transformers_forward(ours: Transformer, attention: str) -> Callable[[Tensor, int], Tensor]:
    """A function: (B, T) ids at a position -> (B, V) logits of the last; with the default cache.

    Args:
        attention: its implementation, "eager" or "sdpa".
    """
    from transformers import DynamicCache, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = config_of(ours.params)
    config._attn_implementation = attention
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config)
    theirs.load_state_dict(transformers_weights(ours), strict=True, assign=True)
    theirs.model.rotary_emb = LlamaRotaryEmbedding(config).to(ours.norm.weight.device)
    theirs.train(False)
    cache = DynamicCache()

    def forward(tokens: Tensor, position: int) -> Tensor:
        nonlocal cache
        if position == 0:
            cache = DynamicCache()
        elif beyond := cache.get_seq_length() - position:
            cache.crop(-beyond)
        out = theirs(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1]
        return logits

    return forward
