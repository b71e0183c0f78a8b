"""Rotary position embedding by complex numbers, in fp32 whatever the model's dtype."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def apply_scaling(freqs: Tensor, scale_factor: float = 8.0) -> Tensor:
    """Llama 3.1's RoPE scaling (arXiv:2407.21783, section 3.4.2): stretch the long wavelengths.

    Above 8192 positions a wavelength's frequency is divided by `scale_factor`, below 2048 it stays,
    and between them the two are blended linearly in 8192 / wavelength.
    """
    low_freq_factor, high_freq_factor, original_context = 1, 4, 8192
    wavelen = 2 * math.pi / freqs
    smooth = (original_context / wavelen - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * freqs / scale_factor + smooth * freqs


def precompute_freqs_cis(
    dim: int,
    end: int,
    theta: float = 10000.0,
    use_scaled: bool = False,
    scale_factor: float = 8.0,
) -> Tensor:
    """RoPE, arXiv:2104.09864: position m turns pair i by the angle m * theta^(-2i/dim).

    Returns:
        (end, dim / 2) complex64 of modulus 1, on the CPU.
    """
    exponent = torch.arange(0, dim, 2, device="cpu", dtype=torch.float32)[: dim // 2] / dim
    freqs = 1.0 / (theta**exponent)
    if use_scaled:
        freqs = apply_scaling(freqs, scale_factor)
    angles = torch.outer(torch.arange(end, device="cpu", dtype=torch.float32), freqs)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Turn each pair (2i, 2i + 1) of every head, in fp32.

    Args:
        xq, xk: (B, T, heads, D).
        freqs_cis: (T, D / 2), or (B, T, D / 2) where rows stand at different positions; or
            `torch.view_as_real` of it, for compilers, which know no complex numbers.
    """
    if not freqs_cis.is_complex():
        return rotate_pairs(xq, freqs_cis), rotate_pairs(xk, freqs_cis)
    freqs_cis = freqs_cis.unsqueeze(-2)  # the same for all heads

    def turn(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * freqs_cis).flatten(-2).type_as(x)

    return turn(xq), turn(xk)


def rotate_pairs(x: Tensor, cos_sin: Tensor) -> Tensor:
    """`apply_rotary_emb` of x (B, T, heads, D) by (T or B x T, D / 2, 2) cosines and sines."""
    cos, sin = cos_sin.unsqueeze(-3).unbind(-1)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).type_as(x)
