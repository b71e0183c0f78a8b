"""RoPE in model.py against the published formulas, written out in Python."""

from __future__ import annotations

import math

import pytest
import torch

from llama import ModelArgs
from llama.model import (
    apply_rotary_emb,
    apply_scaling,
    precompute_freqs_cis,
    reshape_for_broadcast,
)


@pytest.mark.parametrize(("head_dim", "counts"), [(128, (29, 6, 29)), (64, (15, 3, 14))])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaling_by_wavelength(head_dim: int, counts: tuple[int, int, int], factor: float) -> None:
    freqs = 1 / 500000 ** (torch.arange(0, head_dim, 2).double() / head_dim)
    got = apply_scaling(freqs, factor)
    seen = {"unchanged": 0, "blended": 0, "divided": 0}
    for before, after in zip(freqs.tolist(), got.tolist(), strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 2048:
            seen["unchanged"] += 1
            assert after == before
        elif wavelength > 8192:
            seen["divided"] += 1
            assert after == pytest.approx(before / factor, rel=1e-12)
        else:
            seen["blended"] += 1
            smooth = (8192 / wavelength - 1) / 3
            want = before / factor * (1 - smooth) + before * smooth
            assert after == pytest.approx(want, rel=1e-12)
    assert tuple(seen.values()) == counts


@pytest.mark.parametrize(
    ("dim", "n_layers", "factor"),
    [(2048, 16, 32), (3072, 28, 32), (4096, 32, 8), (8192, 80, 8), (16384, 126, 8)],
)
def test_factor_follows_from_the_shape(dim: int, n_layers: int, factor: float) -> None:
    assert ModelArgs(dim=dim, n_layers=n_layers, n_heads=32).scale_factor == factor
    assert ModelArgs(dim=dim, n_layers=n_layers, rope_scale_factor=4).scale_factor == 4


def test_rotation_of_interleaved_pairs() -> None:
    """Pair i at position m turns by m * theta^(-2i/d), written out with sines and cosines."""
    x = torch.randn(1, 5, 2, 8)
    turned, _ = apply_rotary_emb(x, x, precompute_freqs_cis(8, 5, 10000.0))
    for m in range(5):
        for i in range(4):
            angle = m * 10000.0 ** (-2 * i / 8)
            a, b = x[0, m, :, 2 * i], x[0, m, :, 2 * i + 1]
            want = torch.stack(
                [
                    a * math.cos(angle) - b * math.sin(angle),
                    a * math.sin(angle) + b * math.cos(angle),
                ]
            )
            got = torch.stack([turned[0, m, :, 2 * i], turned[0, m, :, 2 * i + 1]])
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_reshape_for_broadcast_is_metas() -> None:
    from llama_models.llama3.model import reshape_for_broadcast as metas

    freqs_cis, x = precompute_freqs_cis(8, 5), torch.zeros(2, 5, 3, 4)
    ours = reshape_for_broadcast(freqs_cis, x)
    assert ours.shape == (1, 5, 1, 4) and torch.equal(ours, metas(freqs_cis, x))


def test_each_row_may_have_rotations_of_its_own() -> None:
    freqs_cis, x = precompute_freqs_cis(8, 5), torch.zeros(2, 3, 6, 4)
    rows = torch.stack([freqs_cis[:3], freqs_cis[2:]])
    assert torch.equal(reshape_for_broadcast(rows, x)[1, :, 0], freqs_cis[2:])
    for wrong in (freqs_cis, rows[:, :, :2], rows[:1].expand(3, 3, 4)):
        with pytest.raises(ValueError, match="do not fit x"):
            reshape_for_broadcast(wrong, x)
