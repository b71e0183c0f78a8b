"""A small Llama with an adapter of peft, and the same adapter here."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import ModelArgs, Transformer
from llama.checkpoints.formats.hf_export import halve
from llama.layers.lora import LoRAConfig, add_lora, initialize_lora, lora_state
from tests.models import random_weights

MODULES = {
    "wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj", "w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj",
}  # fmt: skip
PARTS = {"lora_a": "lora_A", "lora_b": "lora_B", "lora_magnitude": "lora_magnitude_vector"}


def make_ours(shape: dict[str, Any], config: LoRAConfig) -> Transformer:
    """A model whose adapter is random, B too."""
    model = Transformer(ModelArgs(**shape))
    model.load_state_dict(random_weights(**shape))
    model.requires_grad_(requires_grad=False)
    add_lora(model, config)
    randomize(model)
    return model


def randomize(model: nn.Module, seed: int = 3) -> None:
    """Draw an adapter: A as usual, B of the size of A, and magnitudes near the norms."""
    initialize_lora(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in lora_state(model).items():
            values = torch.randn(weight.shape, generator=generator)
            if name.endswith("lora_b"):
                weight.copy_(values * 0.1)
            elif name.endswith("lora_magnitude"):
                weight.mul_(1 + 0.1 * values)


def to_hf(name: str, tensor: Tensor, args: ModelArgs) -> Tensor:
    """With the rows of queries and keys in Hugging Face's order."""
    if not {"wq", "wk"} & set(name.split(".")) or name.endswith("lora_a"):
        return tensor
    return halve(tensor.reshape(len(tensor), -1), args.head_dim).reshape(tensor.shape)


def make_peft(model: Transformer, config: LoRAConfig) -> nn.Module:
    """peft around transformers' Llama, with the model's weights and adapter."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    args = model.params
    hf = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.dim,
            intermediate_size=args.hidden_dim,
            num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads,
            num_key_value_heads=args.kv_heads,
            rms_norm_eps=args.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        )
    )
    options = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.rslora,
        use_dora=config.dora,
        target_modules=[MODULES[target].split(".")[1] for target in config.targets],
    )
    peft: nn.Module = get_peft_model(hf, options)
    found = peft.state_dict()
    for name, tensor in model.state_dict().items():
        found[hf_name(name, set(found))].copy_(to_hf(name, tensor, args))
    return peft


def hf_name(name: str, known: set[str]) -> str:
    """peft's name of one of our weights."""
    prefix = "base_model.model.model."
    parts = name.split(".")
    if parts[0] == "layers" and parts[3] in MODULES:
        module = f"{prefix}layers.{parts[1]}.{MODULES[parts[3]]}"
        if parts[-1] in PARTS:
            return f"{module}.{PARTS[parts[-1]]}.default.weight"
        return f"{module}.base_layer.weight" if parts[4] == "base" else f"{module}.weight"
    special = {
        "tok_embeddings.weight": f"{prefix}embed_tokens.weight",
        "norm.weight": f"{prefix}norm.weight",
        "output.weight": "base_model.model.lm_head.weight",
    }
    kinds = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    found = special.get(name) or f"{prefix}layers.{parts[1]}.{kinds[parts[2]]}.weight"
    assert found in known, found
    return found


def loss_of(model: Transformer, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of the next token."""
    logits = model(tokens)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
