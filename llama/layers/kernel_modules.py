"""What lies between a layer's products, by CPU kernels where they can serve, for a ready model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llama.attention import kernel_attention
from llama.layers import kernels
from llama.layers.quantized_linear import KernelLinear
from llama.model import (
    Attention,
    FeedForward,
    RMSNorm,
    Transformer,
    apply_rotary_emb,
    project,
    swiglu,
)


class KernelRMSNorm(RMSNorm):
    """The same norm in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        if x.dtype != w.dtype or (torch.is_grad_enabled() and w.requires_grad):
            return super().forward(x)
        if not kernels.takes(x):
            return super().forward(x)
        y: Tensor = torch.ops.llama3.rms_norm(x, w, self.eps)
        return y


def kernel_rotary(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """As `apply_rotary_emb`, which a compiler fuses (of real pairs)."""
    if freqs_cis.is_complex() and kernels.takes(xq) and kernels.takes(xk):
        rotary = torch.ops.llama3.rotary
        return rotary(xq, freqs_cis), rotary(xk, freqs_cis)
    return apply_rotary_emb(xq, xk, freqs_cis)


def kernel_swiglu(a: Tensor, b: Tensor) -> Tensor:
    """As `swiglu`."""
    if kernels.takes(a) and kernels.takes(b):
        y: Tensor = torch.ops.llama3.swiglu(a, b)
        return y
    return swiglu(a, b)


def kernel_project(x: Tensor, *linears: nn.Module) -> list[Tensor]:
    """As `project`; matrices side by side are read in one go, which small ones gain by."""
    ws = [linear.weight for linear in linears if isinstance(linear, KernelLinear)]
    if len(ws) == len(linears) and kernels.serves(x, *ws):
        ys: list[Tensor] = torch.ops.llama3.linears(x, ws)
        return ys
    return project(x, *linears)


def use_kernels(model: Transformer) -> None:
    """Attention, norms, rotation and gate by kernels where they serve, else as before."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is RMSNorm:
                with torch.device("meta"):
                    made = KernelRMSNorm(len(child.weight), child.eps)
                made.weight = child.weight
                setattr(module, name, made.train(child.training))
        if isinstance(module, Attention):
            module.project = kernel_project
            module.rotate = kernel_rotary
            module.attend = kernel_attention
        if isinstance(module, FeedForward):
            module.project = kernel_project
            module.gate = kernel_swiglu
