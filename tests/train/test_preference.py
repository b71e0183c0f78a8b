"""Direct preference optimization. The oracle is the paper's formula on transformers and peft."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llama.layers.lora import LoRAConfig, lora_state
from llama.train.batch import IGNORED, Batch
from llama.train.finetune_settings import FinetuneSettings
from llama.train.finetuning import finetune
from llama.train.preference import Pairs, PreferenceObjective
from llama.train.report import read_metrics
from llama.train.rows import Row
from tests.layers.peft_oracle import hf_name, make_ours, make_peft, to_hf

SHAPE: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
SHAPE |= {"vocab_size": 50, "multiple_of": 64, "max_seq_len": 32}
CONFIG = LoRAConfig(rank=4)


def pair(prompt: int, chosen: int, rejected: int, seed: int = 0) -> tuple[Row, Row]:
    """A prompt of so many ids and its two answers."""
    rng = np.random.default_rng([seed, prompt, chosen, rejected])
    begin = rng.integers(1, 50, prompt)
    rows = []
    for length in (chosen, rejected):
        ids = np.concatenate([begin, rng.integers(1, 50, length)]).astype(np.int32)
        rows.append(Row(ids, np.arange(len(ids)) >= prompt))
    return rows[0], rows[1]


PAIRS = [pair(5, 4, 7), pair(2, 9, 3), pair(8, 1, 1)]


def logprob(model: Any, row: Row) -> Tensor:
    """log p of the answer, by transformers, without padding."""
    ids = torch.from_numpy(row.ids.astype(np.int64))
    scores = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    each = scores[:-1].gather(1, ids[1:, None])[:, 0]
    answer: Tensor = each[torch.from_numpy(row.trained[1:])].sum()
    return answer


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_loss_and_gradients_are_those_of_the_formula(beta: float) -> None:
    ours = make_ours(SHAPE, CONFIG)
    peft: Any = make_peft(ours, CONFIG)
    wanted = torch.zeros(())
    for chosen, rejected in PAIRS:
        with torch.no_grad(), peft.disable_adapter():
            reference = logprob(peft, chosen) - logprob(peft, rejected)
        margin = logprob(peft, chosen) - logprob(peft, rejected) - reference
        wanted = wanted + torch.log(1 + torch.exp(-beta * margin))
    objective = PreferenceObjective(ours, beta=beta)
    [batch] = Pairs(PAIRS, max_seq_len=16, batch_size=6).in_order()
    found = objective(*batch)
    assert abs(float(wanted) - 3 * math.log(2)) > 0.01
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    found.backward()
    wanted.backward()
    gradients = {name: p.grad for name, p in peft.named_parameters() if p.grad is not None}
    state = dict(ours.named_parameters())
    for name in lora_state(ours):
        gradient = state[name].grad
        assert gradient is not None
        torch.testing.assert_close(
            to_hf(name, gradient, ours.params),
            gradients[hf_name(name, set(gradients))],
            atol=1e-4,
            rtol=1e-4,
        )


def test_an_initial_adapter_has_the_loss_ln_2_and_learns() -> None:
    model = make_ours(SHAPE, CONFIG)
    with torch.no_grad():
        for name, weight in lora_state(model).items():
            weight.mul_(0.0 if name.endswith("lora_b") else 1.0)
    objective = PreferenceObjective(model)
    trained = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    [batch] = Pairs(PAIRS, max_seq_len=16, batch_size=6).in_order()
    losses = []
    for _ in range(10):
        loss = objective(*batch) / objective.count(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[0] == pytest.approx(math.log(2)) and losses[-1] < 0.4


def test_an_epoch_has_every_pair_once() -> None:
    pairs = [pair(i % 5 + 1, i % 3 + 1, i % 4 + 1, seed=i) for i in range(23)]
    made = Pairs(pairs, max_seq_len=16, batch_size=4, accumulate=2, seed=1)
    objective = PreferenceObjective(make_ours(SHAPE, CONFIG))
    for ranks in (1, 2):
        steps = made.steps_per_epoch(ranks)
        assert steps == -(-23 // (4 * ranks))
        for epoch in (0, 1):
            seen = []
            for step in range(epoch * steps, (epoch + 1) * steps):
                parts = [made.batches(step, rank, ranks) for rank in range(ranks)]
                assert len({len(part) for part in parts}) == 1 and len(parts[0]) <= 2
                batches = [batch for part in parts for batch in part]
                found = [key for batch in batches for key in keys(batch)]
                assert made.target_count(step, ranks) == len(found)
                assert sum(map(objective.count, batches)) == len(found)
                seen += found
            assert sorted(seen) == sorted(key_of(*pair) for pair in pairs)
    longest = max(len(row.ids) for pair in pairs for row in pair) - 1
    assert max(batch.tokens.shape[1] for batch in made.batches(0)) == longest
    assert [keys(batch) for batch in made.batches(3)] == [keys(batch) for batch in made.batches(3)]


def key_of(chosen: Row, rejected: Row) -> str:
    return f"{chosen.ids.tolist()} {rejected.ids.tolist()}"


def keys(batch: Batch) -> list[str]:
    """The ids of the pairs of a batch that have targets, from tokens and targets."""
    rows = []
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        length = max((i + 1 for i, id in enumerate(targets) if id != IGNORED), default=0)
        rows.append([*tokens[:length], targets[length - 1]] if length else None)
    pairs = zip(rows[0::2], rows[1::2], strict=True)
    return [f"{chosen} {rejected}" for chosen, rejected in pairs if chosen]


def test_long_pairs_are_dropped_and_counted() -> None:
    made = Pairs([*PAIRS, pair(3, 20, 1)], max_seq_len=10, batch_size=2)
    assert (len(made), made.dropped) == (4, 4)  # of two pairs that are too long
    with pytest.raises(ValueError, match=r"no pair is left of 3.*--max_seq_len"):
        Pairs(PAIRS, max_seq_len=5, batch_size=2)
    with pytest.raises(ValueError, match="leave pack out"):
        PreferenceObjective(make_ours(SHAPE, CONFIG))(torch.ones(1, 2), torch.ones(1, 2), (1, 1))


def test_a_run_prefers_the_chosen_answers(
    tiny_checkpoint: Callable[..., Path], byte_tokenizer_path: Path, tmp_path: Path
) -> None:
    """From a file of pairs to an adapter that makes chosen answers more probable."""
    base = tiny_checkpoint(vocab_size=512)
    rows = [{"prompt": f"{i} + 1?", "chosen": str(i + 1), "rejected": "no idea"} for i in range(12)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    settings = FinetuneSettings(
        method="dpo", batch_size=4, steps=12, warmup=1, lr=0.01, eval_every=6, samples=1,
        dtype="float32", val_fraction=0.2,
    )  # fmt: skip
    out = tmp_path / "adapter"
    options: Any = {"tokenizer_path": byte_tokenizer_path, "device": "cpu"}
    result = finetune(base, [data], out, settings, **options)
    first = read_metrics(out / "metrics.jsonl")[0]
    assert first["val_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert result.best_loss < 0.9 * math.log(2)
    assert (out / "adapter_model.safetensors").exists()
    for wrong, message in (
        ({"method": "lora"}, "for method dpo"),
        ({"pack": True}, "leave pack out"),
        ({"train_embeddings": True}, "leave train_embeddings out"),
        ({"beta": 0.0}, "beta"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(base, [data], tmp_path / "wrong", replace(settings, **wrong), **options)
    assert not (tmp_path / "wrong").exists()
