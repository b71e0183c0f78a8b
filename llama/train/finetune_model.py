"""The model that is fine-tuned: built without memory, then filled with its base's weights.

Each weight is read, quantized or sharded, and let go before the next one is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from llama.checkpoints.formats.quantized import quantize_weight
from llama.checkpoints.source import Source
from llama.common.meta_device import without_memory
from llama.common.progress import progress
from llama.distributed.sharding import VOCABULARY, weight_shapes
from llama.layers.lora import (
    PARTS,
    LoRALinear,
    add_lora,
    initialize_lora,
    lora_modules,
)
from llama.layers.new_rows import NEW_ROWS, split_rows, tie
from llama.layers.quantized_linear import QUANTIZED, quantized
from llama.layers.replace import replace_modules
from llama.layers.schemes import find_scheme
from llama.model import ModelArgs, Transformer
from llama.train.data_parallel import DataParallel
from llama.train.finetune_settings import FinetuneSettings
from llama.train.objective import Objective, prepare_model
from llama.train.preference import PreferenceObjective


def check_base(source: Source, settings: FinetuneSettings) -> None:
    """Check that a checkpoint can be fine-tuned in this way.

    Raises:
        ValueError: its weights are quantized, and would have to be trained or quantized otherwise.
    """
    if source.quantization is None:
        return
    scheme = source.quantization.name
    remedy = "give the original checkpoint"
    if not settings.adapts:
        raise ValueError(
            f"{source.path} is quantized ({scheme}): its weights cannot be trained; {remedy}, or "
            "use --method lora"
        )
    if settings.train_embeddings:
        raise ValueError(
            f"{source.path} is quantized ({scheme}), also its output layer, which "
            f"--train_embeddings trains; {remedy}, with --quantize {scheme}"
        )
    if settings.quantize not in (None, scheme):
        raise ValueError(
            f"{source.path} is quantized already, to {scheme}; --quantize {settings.quantize} "
            "needs the original checkpoint"
        )


def model_without_weights(
    source: Source, args: ModelArgs, settings: FinetuneSettings
) -> Transformer:
    """The model on the meta device, quantized and with adapters. A tied output is one Parameter."""
    scheme = source.quantization
    if scheme is None and settings.quantize is not None:
        scheme = find_scheme(settings.quantize)
    with without_memory():
        model = Transformer(args)
        if scheme is not None:
            quantize = quantized(scheme)

            def replacement(name: str, linear: nn.Linear) -> nn.Module:
                keeps = name == "output" and settings.train_embeddings
                return linear if keeps else quantize(name, linear)

            replace_modules(model, {nn.Linear: replacement})
        if settings.adapts:
            add_lora(model, settings.lora)
    if source.tied and isinstance(model.output, nn.Linear):
        model.output.weight = model.tok_embeddings.weight
    if settings.embeddings_from:
        split_rows(model, settings.embeddings_from)
    return model


def is_trained(name: str, settings: FinetuneSettings) -> bool:
    """Whether training changes the parameter `name`."""
    if settings.method == "full" or name.rpartition(".")[2] in (*PARTS, NEW_ROWS):
        return True
    if settings.embeddings_from:
        return False
    return name in VOCABULARY and (settings.method == "embeddings" or settings.train_embeddings)


def trained_share(model: Transformer, settings: FinetuneSettings) -> tuple[int, int]:
    """(trained, all) parameters of a model on the meta device; a quantized weight counts whole."""
    counts = {name: w.numel() for name, w in model.named_parameters()}
    trained = sum(n for name, n in counts.items() if is_trained(name, settings))
    for module in model.modules():
        if isinstance(module, QUANTIZED):
            counts[str(id(module))] = module.out_features * module.in_features
    return trained, sum(counts.values())


def make_objective(
    source: Source,
    args: ModelArgs,
    settings: FinetuneSettings,
    ranks: DataParallel,
    dtype: torch.dtype,
) -> Objective:
    """The objective on this rank's device; with FSDP, this rank's shard of it.

    Trained weights are fp32, frozen ones `dtype`.
    """
    model = model_without_weights(source, args, settings)
    prepare_model(model, settings.recompute)
    for name, parameter in model.named_parameters():
        kind = torch.float32 if is_trained(name, settings) else dtype
        parameter.data = parameter.data.to(kind)
        parameter.requires_grad_(is_trained(name, settings))
    objective = Objective(model, settings.seed)
    if settings.method == "dpo":
        objective = PreferenceObjective(model, settings.seed, settings.beta)
    if ranks.kind == "fsdp":
        ranks.shard(objective, list(model.layers))
        model.to_empty(device=ranks.device)
    load_weights(model, source, ranks)
    if settings.adapts:
        for module in lora_modules(model):
            _materialize(module, ranks.device)
        initialize_lora(model, settings.seed)
    return objective


@torch.no_grad()
def load_weights(model: Transformer, source: Source, ranks: DataParallel) -> None:
    """Fill the base's part of the model, weight by weight, on this rank's device."""
    tied = getattr(model.output, "weight", None) is model.tok_embeddings.weight
    names = [name for name in weight_shapes(model.params) if not (tied and name == "output.weight")]
    shown = progress(names, f"loading on {ranks.device}", len(names), "tensor")
    for name in shown if ranks.rank == 0 else names:
        layer = name.removesuffix(".weight")
        module = model.get_submodule(layer)
        if isinstance(module, LoRALinear):
            module = module.base
        for key, value in _stored(source, name, module, ranks.device):
            _fill(module, key, value, ranks.device)
    if tied:
        tie(model)


def _stored(
    source: Source, name: str, module: nn.Module, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """(name in the module, value) of what holds the weight `name`: itself, or codes and scales."""
    if NEW_ROWS in module._parameters:
        first = len(module.get_parameter("weight"))
        yield "weight", source.read(name, 0, 0, first)
        yield NEW_ROWS, source.read(name, 0, first)
        return
    if "weight" in module._parameters:
        yield "weight", source.read(name)
        return
    layer = name.removesuffix(".weight")
    if source.quantization is not None:
        yield from ((key, source.read(f"{layer}.{key}")) for key in module._buffers)
        return
    scheme = find_scheme(str(module.scheme))
    codes = quantize_weight(name, source.read(name).to(device), scheme)
    yield from ((key.rpartition(".")[2], value) for key, value in codes.items())


def _fill(module: nn.Module, key: str, value: Tensor, device: torch.device) -> None:
    """Set a parameter or a buffer. A mapped file becomes a frozen parameter without a copy."""
    if key in module._buffers:
        module.register_buffer(key, value.to(device))
        return
    parameter = module.get_parameter(key)
    if isinstance(parameter, DTensor):  # every rank reads the file: nothing is sent
        value = value.to(device, parameter.dtype)
        mesh, placements = parameter.device_mesh, parameter.placements
        parameter.copy_(distribute_tensor(value, mesh, placements, src_data_rank=None))
        return
    trained = parameter.requires_grad
    value = value.to(device, parameter.dtype, copy=trained).contiguous()
    setattr(module, key, nn.Parameter(value, requires_grad=trained))


def _materialize(module: LoRALinear, device: torch.device) -> None:
    """Allocate the adapter's parameters that are still on the meta device."""
    for key in PARTS:
        parameter: Any = getattr(module, key)
        if parameter is not None and parameter.is_meta:
            setattr(module, key, nn.Parameter(torch.empty_like(parameter, device=device)))
