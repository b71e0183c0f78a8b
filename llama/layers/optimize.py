"""Chooses the replacements for a loaded model, by its device, its dtype and the user's options."""

from __future__ import annotations

import torch
from torch import nn

from llama.distributed import tensor_parallel
from llama.layers import cuda_ops, kernels
from llama.layers.attention import FlashAttention, GroupedAttention, KernelAttention
from llama.layers.fused_layers import FusedLayers
from llama.layers.gpu_modules import (
    HALF,
    FusedRMSNorm,
    TritonLinear,
    blocks_on_gpu,
    flash_works,
    is_ampere,
    tinygemm_or_same,
    triton_int8_or_same,
    triton_works,
)
from llama.layers.joined import JoinedFeedForward, JoinedHeads, joined
from llama.layers.kernel_modules import KernelFeedForward, KernelHeads, KernelLinear, KernelRMSNorm
from llama.layers.lora import lora_modules
from llama.layers.quantized_linear import (
    BlockLinear,
    Int4Linear,
    Int8Linear,
    check_ranks,
    quantized,
)
from llama.layers.replace import Factory, factory_of, replace_modules
from llama.layers.schemes import Scheme
from llama.model import Attention, DotProductAttention, FeedForward, Layers, RMSNorm, Transformer

Table = dict[type[nn.Module], Factory]

# Bit-identical to the reference, without copies of key-value heads.
REFERENCE: Table = {DotProductAttention: factory_of(GroupedAttention)}
# The fastest modules for any device; results differ from the reference by rounding only.
FAST: Table = {
    DotProductAttention: factory_of(KernelAttention),
    Attention: factory_of(KernelHeads),
    FeedForward: factory_of(KernelFeedForward),
    RMSNorm: factory_of(KernelRMSNorm),
}
# On NVIDIA's GPUs in half precision: first what makes fewer linears, then these in FAST.
JOINED: Table = {
    Attention: joined(JoinedHeads, "wqkv", "wq", "wk", "wv"),
    FeedForward: joined(JoinedFeedForward, "w13", "w1", "w3"),
}
GPU: Table = {RMSNorm: factory_of(FusedRMSNorm)}
TRITON: Table = {nn.Linear: factory_of(TritonLinear), Int8Linear: triton_int8_or_same}


def quantize_model(model: Transformer, scheme: Scheme | str | None) -> None:
    """Store the linears of a loaded model in 8 or 4 bits; see `quantized`.

    All ranks of the model must call this at the same time.

    Args:
        scheme: such as "int8" or "int4"; None changes nothing.

    Raises:
        ValueError: the model cannot be quantized this way.
    """
    if scheme is None:
        return
    check_ranks(model.params, scheme)
    if not isinstance(model.output, nn.Linear):
        raise ValueError("this model is quantized already; build it anew from its checkpoint")
    if next(lora_modules(model), None) is not None:
        raise ValueError("quantize a model before an adapter is added to it")
    sharded = tensor_parallel.size() > 1
    replace_modules(model, {nn.Linear: quantized(scheme, sharded=sharded)})


def optimize(model: Transformer, exact: bool = False) -> None:
    """Replace modules of a loaded model by faster ones, after `quantize_model` and `add_lora`.

    Args:
        exact: the reference's arithmetic in everything but quantized linears.
    """
    if exact:
        replace_modules(model, REFERENCE)
        return
    device, dtype = model.norm.weight.device, model.norm.weight.dtype
    table = dict(FAST)
    if dtype in HALF and is_ampere(device):
        cuda_ops.load()
        replace_modules(model, JOINED)
        table |= GPU
        if flash_works(device, dtype, model.params.head_dim):
            table[DotProductAttention] = factory_of(FlashAttention)
        if triton_works(device):
            table |= TRITON
        if dtype == torch.bfloat16:
            table[Int4Linear] = tinygemm_or_same
        table[BlockLinear] = blocks_on_gpu(dtype == torch.bfloat16, triton_works(device))
    fast = device.type == "cpu" and kernels.load()
    tensor_parallel.share_sums(fast)
    if fast:
        table |= {nn.Linear: factory_of(KernelLinear), Layers: factory_of(FusedLayers)}
    replace_modules(model, table)
