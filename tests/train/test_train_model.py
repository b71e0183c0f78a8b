"""Loss, gradients, initial weights, optimizer and learning rate, partly against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks.transformers_peer import config_of
from llama import ModelArgs, Transformer
from llama.checkpoints.formats.hf_config import hf_name
from llama.checkpoints.formats.hf_export import halve
from llama.train.objective import Objective, prepare_model
from llama.train.optimizer import initialize, make_optimizer, parameter_groups
from llama.train.settings import Settings
from tests.models import TINY, random_weights


def objective_of(model: Transformer, recompute: bool = False) -> Objective:
    prepare_model(model, recompute)
    return Objective(model)


def permuted(name: str, w: torch.Tensor, head_dim: int) -> torch.Tensor:
    """A weight in the row order of Hugging Face checkpoints."""
    return halve(w, head_dim) if name.split(".")[-2] in ("wq", "wk") else w


@pytest.mark.parametrize(("recompute", "masked"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dim": 48, "n_heads": 6, "n_kv_heads": 1, "n_layers": 3, "norm_eps": 1e-3},
        {"n_kv_heads": None, "use_scaled_rope": True, "rope_theta": 1e4, "multiple_of": 7},
    ],
)
def test_loss_and_gradients(changes: dict[str, Any], recompute: bool, masked: bool) -> None:
    """Also of rows with padding and with parts that are not trained on."""
    transformers = pytest.importorskip("transformers")
    params = TINY | {"vocab_size": 101} | changes
    args = ModelArgs(**params, max_seq_len=40)
    model = Transformer(args)
    model.load_state_dict(random_weights(**params))
    theirs = transformers.LlamaForCausalLM(config_of(args))
    weights = {hf_name(n): permuted(n, w, args.head_dim) for n, w in model.state_dict().items()}
    theirs.load_state_dict(weights)
    ids = torch.randint(0, 101, (3, 41))
    labels = ids.clone()
    if masked:
        seen = torch.arange(41) < torch.tensor([[41], [17], [30]])
        labels[torch.rand(labels.shape) < 0.5] = labels[~seen] = -100
        expected = theirs(input_ids=ids, labels=labels, attention_mask=seen.long()).loss
    else:
        expected = theirs(input_ids=ids, labels=labels).loss
    expected.backward()
    targets = labels[:, 1:]
    loss = objective_of(model, recompute)(ids[:, :-1], targets) / (targets != -100).sum()
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    gradients = {name: w.grad for name, w in theirs.named_parameters()}
    assert len(gradients) == len(list(model.parameters()))
    for name, w in model.named_parameters():
        assert w.grad is not None
        ours = permuted(name, w.grad, args.head_dim)
        torch.testing.assert_close(ours, gradients[hf_name(name)], atol=1e-4, rtol=1e-4)


def test_recompute_saves_fewer_activations() -> None:
    """Counts the numbers that autograd saves for the backward pass."""
    saved = {}
    params: dict[str, Any] = TINY | {"vocab_size": 101}
    model = Transformer(ModelArgs(**params, max_seq_len=40))
    ids = torch.randint(0, 101, (3, 41))
    for recompute in (False, True):
        sizes: list[int] = []

        def pack(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            objective_of(model, recompute)(ids[:, :-1], ids[:, 1:])
        saved[recompute] = sum(sizes)
    assert saved[True] < 0.5 * saved[False]


def test_overfits_a_batch() -> None:
    settings = Settings(dim=32, n_layers=2, n_heads=2, lr=0.01)
    model = Transformer(settings.model_args(30))
    initialize(model, 1)
    objective = objective_of(model)
    optimizer = make_optimizer(parameter_groups(objective, settings), settings)
    ids = torch.randint(0, 30, (2, 33))
    ids[:, 0] = torch.arange(2)  # different first ids: rows must be distinguishable
    for _ in range(150):
        loss = objective(ids[:, :-1], ids[:, 1:]) / 64
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert float(loss.detach()) < 0.01


def test_dtype_by_its_short_name() -> None:
    assert Settings(dtype="bf16") == Settings(dtype="bfloat16")
    assert Settings(dtype="auto") == Settings()


def test_model_args() -> None:
    assert Settings(max_seq_len=256).model_args(65).rope_theta == 4096
    assert Settings(rope_theta=5e5).model_args(65).rope_theta == 5e5
    assert Settings(dim=512).model_args(65).hidden_dim == 1536  # 8/3 of 512, rounded up


def test_initial_weights() -> None:
    args = Settings(dim=96, n_layers=8).model_args(500)
    model, same, other = (Transformer(args) for _ in range(3))
    state = torch.get_rng_state()
    initialize(model, 1)
    initialize(same, 1)
    initialize(other, 2)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is unchanged
    for name, w in model.state_dict().items():
        assert torch.equal(w, same.state_dict()[name])
        if w.dim() == 1:
            assert (w == 1).all()
            continue
        assert not torch.equal(w, other.state_dict()[name])
        residual = name.endswith(("wo.weight", "w2.weight"))
        std = 96**-0.5 / (4 if residual else 1) if name.startswith(("l", "o")) else 1.0
        assert math.isclose(w.std(), std, rel_tol=0.05) and abs(w.mean()) < 0.05 * std


def test_only_matrices_decay() -> None:
    """With zero gradients, AdamW multiplies a weight by 1 - lr * weight_decay."""
    settings = Settings(dim=32, n_layers=1, n_heads=2, lr=0.5, weight_decay=0.1)
    model = Transformer(settings.model_args(30))
    optimizer = make_optimizer(parameter_groups(model, settings), settings)
    before = {name: w.detach().clone() for name, w in model.named_parameters()}
    for w in model.parameters():
        w.grad = torch.zeros_like(w)
    optimizer.step()
    for name, w in model.named_parameters():
        factor = 0.95 if w.dim() == 2 else 1.0
        torch.testing.assert_close(w.detach(), factor * before[name])


def test_learning_rate() -> None:
    settings = Settings(steps=111, warmup=10, lr=1.0, final_lr=0.2)
    rates = [settings.lr_at(step) for step in range(111)]
    assert rates[:11] == pytest.approx([*(i / 10 for i in range(1, 11)), 1.0])
    assert rates[60] == pytest.approx(0.6) and rates[35] == pytest.approx(0.6 + 0.4 * 0.5**0.5)
    assert Settings(dim=256).peak_lr == Settings(dim=128).peak_lr / 2
    assert Settings(warmup=0, lr=1.0).lr_at(0) == 1.0
    short = Settings(steps=5, warmup=100, lr=1.0)  # warm-up takes half of the steps
    assert [short.lr_at(step) for step in range(5)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("warmup", [0, 1, 3, 100])
def test_the_last_update_has_the_final_learning_rate(warmup: int) -> None:
    for steps in (2, 3, 4, 10, 11, 1000):
        settings = Settings(steps=steps, warmup=warmup, lr=0.5, final_lr=0.1)
        assert settings.lr_at(steps - 1) == pytest.approx(0.05)
        assert max(settings.lr_at(step) for step in range(steps)) == pytest.approx(0.5)
    assert Settings(steps=1, warmup=warmup, lr=0.5, final_lr=0.1).lr_at(0) == 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be a positive integer, not 0"),
        ({"batch_size": 1.5}, "batch_size must be a positive integer, not 1.5"),
        ({"lr": -1.0}, "lr must be a positive number, not -1.0"),
        ({"lr": math.nan}, "lr must be a positive number, not nan"),
        ({"lr": "fast"}, "lr must be a positive number, not 'fast'"),
        ({"final_lr": 2.0}, "final_lr must be a number from 0 to 1, not 2.0"),
        ({"beta2": 1}, "beta2 must be a number from 0 to below 1, not 1"),
        ({"warmup": -1}, "warmup must be an integer from 0 on, not -1"),
        ({"dim": 30}, "dim 30 must be an even multiple of n_heads 4"),
        ({"n_kv_heads": 3}, "n_kv_heads must divide n_heads 4, and is 3"),
        ({"dtype": "int8"}, r"unknown dtype 'int8'; use one of \('float32', 'bfloat16'\)"),
        ({"parallel": "tp"}, r"unknown parallel 'tp'; use one of \('ddp', 'fsdp'\)"),
        ({"recompute": "yes"}, "recompute must be of type bool, not 'yes'"),
    ],
)
def test_bad_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**values)
