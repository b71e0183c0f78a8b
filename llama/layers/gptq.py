"""Rounding of a weight that keeps its outputs: GPTQ, arXiv:2210.17323. Imports no model.

The columns of a weight are rounded one after the other, and those that are left make up for the
error, as far as the inputs that they multiply are correlated.

Shapes: N rows (outputs) and K columns (inputs) of a weight, C columns of a block (see blocks.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.layers.blocks import find_grid, pack, refit_group
from llama.layers.schemes import BLOCK_GROUP, TILE, block_columns

DAMPING = 0.01  # of the mean of the moments' diagonal, added to it
MOST_DAMPING = 100.0
ROWS = 4096  # that are rounded at a time


def inverse_factor(moments: Tensor) -> Tensor:
    """The upper triangular U with U^T U = (H + d I)^-1, up to a factor, for H = `moments`.

    d is DAMPING times the mean of H's diagonal; more if H is singular all the same. Without any
    input, U is the identity: then no error moves from one column to another.

    Args:
        moments: (K, K) fp32, the sum of x^T x over inputs x; finite.
    """
    identity = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    mean, damping = moments.diagonal().mean(), DAMPING
    while mean > 0 and damping <= MOST_DAMPING:
        damped = moments / mean
        damped.diagonal().add_(damping)
        # With rows and columns reversed, the lower factor of H becomes an upper one: V V^T = H.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        del damped  # these matrices are large
        if not failed:
            upper = lower.flip(0, 1)
            del lower
            factor: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
            return factor
        damping *= 10
    return identity


def compensated_blocks(w: Tensor, factor: Tensor, bits: int) -> Tensor:
    """Blocks of `quantize_blocks` for w (N, K), with codes and grids that keep w's outputs.

    Args:
        factor: U of `inverse_factor` for w's inputs, (K, K).
    """
    return torch.cat([_compensated(rows, factor, bits) for rows in w.split(ROWS)])


def _compensated(w: Tensor, factor: Tensor, bits: int) -> Tensor:
    w = F.pad(w.float(), (0, 0, 0, -len(w) % TILE))
    K = w.shape[1]
    C = block_columns(K)
    done = []
    for start in range(0, K, C):
        here, later = slice(start, start + C), slice(start + C, K)
        blocks, errors = _round_block(w[:, here], factor[here, here], bits)
        w[:, later] -= errors.T @ factor[here, later]
        done.append(blocks)
    return torch.cat(done, dim=1)


def _round_block(w: Tensor, factor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round the columns of a block.

    Args:
        w: (N, C). factor: (C, C), this block's part of U.

    Returns:
        the block (T, 1, bytes), and the errors (C, N) in units of U's diagonal.
    """
    importance = factor.diagonal() ** -2  # the cost of an error after later columns' changes
    importance /= importance.max()
    grid = find_grid(w, bits, importance)
    w = w.T.contiguous()  # (C, N): a column is contiguous
    codes, errors = torch.empty_like(w, dtype=torch.uint8), torch.empty_like(w)
    for start in range(0, len(w), BLOCK_GROUP):
        end, g = start + BLOCK_GROUP, start // BLOCK_GROUP
        if start:  # these weights have changed since `find_grid`
            refit_group(grid, g, w[start:end].T, bits, importance[start:end])
        scale, zero = grid.scale()[:, g].contiguous(), grid.zero()[:, g].contiguous()
        step = scale.where(scale > 0, 1)
        for i in range(start, end):
            code = ((w[i] + zero) / step).round_().clamp_(0, 2**bits - 1)
            codes[i] = code
            errors[i] = (w[i] - (code * scale - zero)) / factor[i, i]
            w[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i], alpha=-1)
        w[end:].addmm_(factor[start:end, end:].T, errors[start:end], alpha=-1)
    return pack(grid, codes.T.contiguous(), bits), errors
