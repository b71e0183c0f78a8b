"""A plain copy of a loaded model that shares its weights, so that hooks on it are not on the model.

The copy has the modules of model.py. Only its linears compute by the loaded model's modules,
whatever their kind: quantized, with an adapter, or one matmul for several.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from llama.common.meta_device import without_memory
from llama.layers.adapter_rows import AdapterRows, LowRank, MultiLoRALinear, adapters_of
from llama.layers.joined import JoinedFeedForward, JoinedHeads
from llama.layers.lora import LoRALinear
from llama.model import (
    Attention,
    DotProductAttention,
    FeedForward,
    Layers,
    RMSNorm,
    Transformer,
    TransformerBlock,
)


class Shared(nn.Module):
    """A linear of the loaded model, or some of its outputs.

    Attributes:
        linear: the loaded model's own module.
        start, outputs: which of its outputs; all of them unless several linears are joined in one.
    """

    def __init__(self, linear: nn.Module, start: int = 0, outputs: int | None = None):
        super().__init__()
        self.linear, self.start = linear, start
        self.outputs = outputs_of(linear) if outputs is None else outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y.narrow(-1, self.start, self.outputs)


def base_of(linear: nn.Module) -> nn.Module:
    """The linear without its adapter."""
    base = linear.base if isinstance(linear, (LoRALinear, MultiLoRALinear)) else linear
    assert isinstance(base, nn.Module)
    return base


def low_rank_of(linear: nn.Module) -> list[Tensor]:
    """A (r, K) and B (N, r) that are added to a linear, then DoRA's factors; none without."""
    if isinstance(linear, LoRALinear):
        found = [linear.lora_a, linear.lora_b, linear.lora_magnitude]
        return [tensor for tensor in found if tensor is not None]
    if isinstance(linear, MultiLoRALinear):
        parts = [linear.parts[key] for key, _ in linear.chosen.groups if key in linear.parts]
        return [t for part in parts if isinstance(part, LowRank) for t in part.buffers()]
    return []


def outputs_of(linear: nn.Module) -> int:
    return int(base_of(linear).out_features)  # type: ignore[arg-type]


def inputs_of(linear: nn.Module) -> int:
    return int(base_of(linear).in_features)  # type: ignore[arg-type]


def plain_copy(model: Transformer, adapter: str | None = None, room: int = 1) -> Transformer:
    """A `Transformer` of plain modules with the weights of `model`, which is not changed.

    Args:
        model: on one rank.
        adapter: the name of one of the model's adapters; None: the base.
        room: most positions.

    Raises:
        ValueError: there is no such adapter; or see `check_known`.
    """
    check_known(model)
    with without_memory():
        copy = Transformer(replace(model.params, max_seq_len=room))
    chosen = adapters_of(model)
    own = None if chosen is None else AdapterRows(chosen.names, model)
    if own is not None:  # the model's own is set by the engine, which may run in another thread
        own.select([adapter])

    def shared(linear: nn.Module, start: int = 0, outputs: int | None = None) -> Shared:
        if isinstance(linear, MultiLoRALinear) and own is not None:
            parts = {key: part for key, part in linear.parts.items() if isinstance(part, LowRank)}
            linear = MultiLoRALinear(linear.base, own, parts)
        return Shared(linear, start, outputs)

    copy.tok_embeddings.weight = model.tok_embeddings.weight
    for block, loaded in zip(copy.layers, model.layers, strict=True):
        for name in ("attention_norm", "ffn_norm"):
            share_norm(block.get_submodule(name), loaded.get_submodule(name))
        for part, linears in places_of_linears(loaded).items():
            for name, place in linears.items():
                setattr(block.get_submodule(part), name, shared(*place))
    share_norm(copy.norm, model.norm)
    copy.output = shared(model.output)  # type: ignore[assignment]
    return copy


def share_norm(norm: nn.Module, loaded: nn.Module) -> None:
    norm.weight, norm.eps = loaded.weight, loaded.eps


BLOCK: dict[str, type[nn.Module]] = {
    "": TransformerBlock,
    "attention": Attention,
    "attention.core": DotProductAttention,
    "feed_forward": FeedForward,
    "attention_norm": RMSNorm,
    "ffn_norm": RMSNorm,
}


def check_known(model: Transformer) -> None:
    """Check that the model has the modules that `Llama.build` makes, and no hooks on them.

    A copy of another model would compute something else. Linears may have hooks: they are run.

    Raises:
        ValueError: it has others.
    """
    if len(model.layers) != model.params.n_layers:
        raise ValueError(
            f"explain needs all {model.params.n_layers} layers of the model, and it has "
            f"{len(model.layers)}; build it anew"
        )
    check_module("the model", model, Transformer)
    check_module("tok_embeddings", model.tok_embeddings, nn.Embedding)
    check_module("layers", model.layers, Layers)
    check_module("norm", model.norm, RMSNorm)
    check_module("output", model.output)
    for i, block in enumerate(model.layers):
        modules = dict(block.named_modules())
        for path, kind in BLOCK.items():
            module = modules.get(path, nn.Identity())
            check_module(f"layers.{i}.{path}".rstrip("."), module, kind)
        for part in ("attention", "feed_forward"):
            for name, module in block.get_submodule(part).named_children():
                if name.startswith("w"):
                    check_module(f"layers.{i}.{part}.{name}", module)


def check_module(name: str, module: nn.Module, kind: type[nn.Module] | None = None) -> None:
    """Raise a ValueError unless this is a module of the library, a `kind` without hooks.

    Args:
        kind: None: a linear, which may have hooks.
    """
    ours = type(module).__module__.startswith("llama.") or type(module) in (nn.Linear, nn.Embedding)
    if not ours or not isinstance(module, kind or nn.Module):
        raise ValueError(
            f"explain knows the modules that Llama.build makes, and {name} is a "
            f"{type(module).__name__}; build the model anew"
        )
    if kind is not None and (module._forward_hooks or module._forward_pre_hooks):
        raise ValueError(f"explain would not run the hooks on {name}; remove them first")


Place = tuple[nn.Module] | tuple[nn.Module, int, int]


def places_of_linears(block: nn.Module) -> dict[str, dict[str, Place]]:
    """{"attention": {"wq": (linear,) or (joined linear, first output, outputs), ...}, ...}."""
    attention, feed_forward = block.get_submodule("attention"), block.get_submodule("feed_forward")
    assert isinstance(attention, Attention) and isinstance(feed_forward, FeedForward)
    if isinstance(attention, JoinedHeads):
        H, K, D = attention.n_local_heads, attention.n_local_kv_heads, attention.head_dim
        q, k = H * D, K * D
        heads: dict[str, Place] = {
            "wq": (attention.wqkv, 0, q),
            "wk": (attention.wqkv, q, k),
            "wv": (attention.wqkv, q + k, k),
        }
    else:
        heads = {"wq": (attention.wq,), "wk": (attention.wk,), "wv": (attention.wv,)}
    if isinstance(feed_forward, JoinedFeedForward):
        half = outputs_of(feed_forward.w13) // 2
        hidden: dict[str, Place] = {
            "w1": (feed_forward.w13, 0, half),
            "w3": (feed_forward.w13, half, half),
        }
    else:
        hidden = {"w1": (feed_forward.w1,), "w3": (feed_forward.w3,)}
    heads["wo"], hidden["w2"] = (attention.wo,), (feed_forward.w2,)
    return {"attention": heads, "feed_forward": hidden}
