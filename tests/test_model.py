"""model.py against Meta's published Transformer on random models, caches, positions, devices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llama import ModelArgs, Transformer
from llama.engine import drawing, forward
from llama.engine.request import Generation, Request
from llama.engine.sampling import Sampling
from llama.layers.attention import grouped_attention
from llama.layers.optimize import optimize
from llama.model import DotProductAttention
from tests.models import meta_model, random_weights

SHAPES = {
    "grouped": {},
    "multi-head": {"n_kv_heads": None},
    "multi-query": {"n_kv_heads": 1},
    "three groups of three": {"dim": 72, "n_heads": 9, "n_kv_heads": 3},
    "wide feed-forward": {"ffn_dim_multiplier": 1.3, "multiple_of": 64},
    "narrow feed-forward": {"ffn_dim_multiplier": 0.4, "multiple_of": 8},
    "scaled rope": {"use_scaled_rope": True, "dim": 256, "n_heads": 2, "n_kv_heads": 1},
    "other theta, eps": {"rope_theta": 10000.0, "norm_eps": 1e-3},
    "odd vocabulary": {"vocab_size": 517},
    "one layer, one head": {"n_layers": 1, "n_heads": 1, "n_kv_heads": 1},
}
BASE = {
    "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 300,
    "multiple_of": 16, "max_batch_size": 3, "max_seq_len": 64,
}  # fmt: skip


def ours(**params: Any) -> Transformer:
    model = Transformer(ModelArgs(**params))
    model.load_state_dict(random_weights(**params), strict=True)
    return model


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_logits_equal_metas(one_rank_group: None, changes: dict[str, Any]) -> None:
    params = BASE | changes
    model, meta = ours(**params), meta_model(params, random_weights(**params))
    tokens = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(1))
    for start, end in [(0, 20), *((i, i + 1) for i in range(20, 30)), (30, 37), (37, 40)]:
        got = model(tokens[:, start:end], start)
        assert got.dtype == torch.float32 and not got.requires_grad
        want = meta(tokens[:, start:end], start)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_rows_at_their_own_positions() -> None:
    """Ragged rows in one call equal each row alone."""
    model, tokens = ours(**BASE), torch.randint(0, 300, (3, 30))
    whole = model(tokens)
    lengths = [5, 17, 11]
    cache = model.new_cache(3, 64)
    model.hidden(tokens[:, :17], 0, cache)
    start = torch.tensor(lengths)
    step = torch.stack([row[n : n + 4] for row, n in zip(tokens, lengths, strict=True)])
    h = model.hidden(step, start, cache, cache_len=21)
    for row, n in enumerate(lengths):
        want = whole[row, n : n + 4]
        torch.testing.assert_close(model.logits(h[row]), want, atol=1e-5, rtol=0)
    one = model.hidden(step[:, :1], start, cache)  # one position a row, the whole cache read
    torch.testing.assert_close(model.logits(one), model.logits(h[:, :1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("exact_scores", [0, 1 << 24], ids=["fused", "exact"])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (6, 1)])
def test_grouped_attention_equals_plain(
    monkeypatch: pytest.MonkeyPatch, exact_scores: int, heads: tuple[int, int]
) -> None:
    monkeypatch.setattr("llama.layers.attention.EXACT_SCORES", exact_scores)
    H, K = heads
    for B, T, S, ragged in [(2, 7, 7, None), (3, 1, 9, None), (3, 1, 9, True), (2, 3, 9, True)]:
        xq, keys, values = torch.randn(B, T, H, 8), torch.randn(B, S, K, 8), torch.randn(B, S, K, 8)
        mask = torch.rand(B, 1, T, S) < 0.7 if ragged else None
        if mask is not None:
            mask[..., 0] = True
        got = grouped_attention(xq, keys, values, mask)
        torch.testing.assert_close(got, DotProductAttention()(xq, keys, values, mask))


def test_without_a_cache_it_is_causal_and_can_be_trained() -> None:
    model, tokens = ours(**BASE), torch.randint(0, 300, (2, 12))
    logits = model(tokens)
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 300
    torch.testing.assert_close(model(changed)[:, :8], logits[:, :8])
    assert not torch.allclose(model(changed)[:, 8:], logits[:, 8:])
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.autograd.backward(loss)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert model.cache is None


@pytest.mark.parametrize("factor", [8, 32, 16])
def test_model_takes_its_own_rope_factor(factor: int) -> None:
    """Factor 8 equals Meta's code; others scale the longest wavelengths in proportion."""
    from llama_models.llama3.model import precompute_freqs_cis

    params = BASE | {"dim": 256, "n_heads": 2, "use_scaled_rope": True, "max_seq_len": 9000}
    with torch.device("meta"):
        model = Transformer(ModelArgs(**params, rope_scale_factor=factor))  # type: ignore[arg-type]
    meta = precompute_freqs_cis(128, 9000, 500000.0, True)
    assert torch.equal(model.freqs_cis, meta) == (factor == 8)
    angle = model.freqs_cis[8192, -1].angle() * factor
    torch.testing.assert_close(angle, meta[8192, -1].angle() * 8, atol=1e-4, rtol=1e-4)


def test_rope_stays_complex64_whatever_the_dtype() -> None:
    model = ours(**BASE).to(torch.bfloat16)
    model(torch.tensor([[1, 2, 3]]), 0)
    assert model.freqs_cis.dtype == torch.complex64
    assert model.cache is not None and model.cache[0].k.dtype == torch.bfloat16


def test_cache_is_not_in_the_state_dict() -> None:
    model = ours(**BASE)
    names = set(model.state_dict())
    model(torch.tensor([[1, 2]]), 0)
    assert model.cache is not None and set(model.state_dict()) == names


def test_start_pos_of_other_integer_types() -> None:
    model, tokens = ours(**BASE), torch.randint(0, 300, (1, 4))
    want = model(tokens, 2)
    for start in (np.int64(2), torch.tensor(2), torch.tensor([2])):
        torch.testing.assert_close(model(tokens, start), want)


def test_positions_outside_the_cache_are_refused() -> None:
    model = ours(**BASE)
    with pytest.raises(ValueError, match="max_seq_len 64"):
        model(torch.zeros(1, 2, dtype=torch.long), 63)
    with pytest.raises(ValueError, match="outside"):
        model(torch.zeros(1, 2, dtype=torch.long), -1)
    with pytest.raises(ValueError, match="4 rows do not fit a cache of 3"):
        model(torch.zeros(4, 2, dtype=torch.long), 0)
    with pytest.raises(ValueError, match="max_seq_len"):
        model(torch.zeros(1, 65, dtype=torch.long))


def test_vocabulary_must_be_known() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        Transformer(ModelArgs(dim=64, n_layers=1, n_heads=2))


@pytest.mark.parametrize(("scaled", "exact"), [(False, True), (True, False)])
def test_cuda_path_keeps_every_tensor_on_the_device(
    monkeypatch: pytest.MonkeyPatch, scaled: bool, exact: bool
) -> None:
    """Prefill, decode and sampling on fake CUDA tensors: a CPU tensor among them would raise."""
    monkeypatch.setattr("llama.layers.optimize.is_ampere", lambda device: False)
    args = ModelArgs(**(BASE | {"use_scaled_rope": scaled}))  # type: ignore[arg-type]
    with FakeTensorMode(allow_non_fake_inputs=False), torch.inference_mode():
        with torch.device("meta"):
            model = Transformer(args)
        weights = {
            name: torch.empty(w.shape, dtype=torch.bfloat16, device="cuda")
            for name, w in model.state_dict().items()
        }
        model.load_state_dict(weights, strict=True, assign=True)
        optimize(model, exact=exact)
        cache = model.new_cache(3, 64)
        prompts = [[1, 2, 3], [4, 5, 6, 7], [8]]
        for chunks, starts in (prompts, [0, 0, 0]), ([[5]] * 3, [3, 4, 1]), ([[5]] * 3, [7] * 3):
            h = forward.hidden_of_chunks(model, cache, chunks, starts, 0)
            last = torch.arange(3, device="cuda") * h.shape[1]
            logits = model.logits(h.flatten(0, 1).index_select(0, last))
            assert logits.device.type == "cuda" and logits.dtype == torch.float32
            for how in Sampling(0), Sampling(0.6, 0.9, 20, 0.01):
                places = [drawing.Place(Generation(Request(p, sampling=how)), 0) for p in prompts]
                ids = drawing.draw_once(places, [[]] * 3, logits)
                assert ids.device.type == "cuda" and ids.shape == (3,)
            assert drawing.chosen_logprobs(logits, ids).device.type == "cuda"
        tokens = torch.zeros(3, 9, dtype=torch.long, device="cuda")
        assert model(tokens, 9).shape == (3, 9, 300)
        assert model(tokens).device.type == "cuda"


def test_a_position_needs_a_cache() -> None:
    model, tokens = ours(**BASE), torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="give both"):
        model.hidden(tokens, 3)
    with pytest.raises(ValueError, match="give both"):
        model.hidden(tokens, cache=model.new_cache(1, 8))
