"""The demo model by Meta's code and by ours: the same logits, log-probabilities and ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llama import Llama
from tests import reference
from tests.models import meta_model

TEXTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time, in a small village,",
    "The three primary colours are",
    "def fibonacci(n):\n    ",
    "The quick brown fox",
    "In 1969, the first",
    "To make bread you need flour,",
    "Photosynthesis is the process by which",
    "My favourite season is autumn because",
    "El perro come",
    "1, 2, 3, 4, 5,",
    "Dear Sir or Madam,",
    "The mitochondria are",
    "SELECT name FROM users WHERE",
    "She opened the door and",
    "The square root of 144 is",
    "A haiku about rain:\n",
    "Breaking news:",
    "The difference between a crocodile and an alligator is",
    "for i in range(10):",
]


LENGTHS = (3, 5, 8)  # tokens; seven prompts of each


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    """The kernels divide their work, also where the suite runs with one thread a process."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def meta(one_rank_group: None, demo_dir: Path) -> torch.nn.Module:
    params = json.loads((demo_dir / "params.json").read_text())
    weights = torch.load(demo_dir / "consolidated.00.pth", weights_only=True)
    return meta_model(params | {"max_batch_size": 7, "max_seq_len": 128}, weights)


@pytest.fixture(scope="module")
def groups(demo: Llama) -> list[list[list[int]]]:
    """Seven prompts of each length: the first ids of each text, which is repeated once."""
    encoded = [demo.tokenizer.encode(f"{text} {text}", bos=True, eos=False) for text in TEXTS]
    return [[ids[:n] for ids in encoded[i::3]] for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def expected(
    meta: torch.nn.Module, groups: list[list[list[int]]]
) -> list[tuple[list[list[int]], torch.Tensor, torch.Tensor]]:
    """64 ids for each prompt by Meta's code; stop tokens are ignored, so that all are long."""
    return [reference.greedy(meta, prompts, 64) for prompts in groups]


Expected = list[tuple[list[list[int]], torch.Tensor, torch.Tensor]]


def test_logits_of_prefill_and_every_decode_step(demo: Llama, expected: Expected) -> None:
    for length, (ids, _, want) in zip(LENGTHS, expected, strict=True):
        tokens = torch.tensor(ids)
        logits = demo.model(tokens[:, :length], 0)[:, -1]
        for i in range(want.shape[1]):
            torch.testing.assert_close(logits, want[:, i], atol=1e-4, rtol=0)
            logits = demo.model(tokens[:, length + i, None], length + i)[:, -1]


def test_greedy_ids_and_logprobs(
    demo: Llama,
    groups: list[list[list[int]]],
    expected: Expected,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """21 prompts x 64 tokens, in ragged batches."""
    monkeypatch.setattr(demo.tokenizer, "stop_tokens", [])
    for i in range(7):
        batch = [prompts[i] for prompts in groups]
        ids, scores = demo.generate(batch, 64, temperature=0, logprobs=True, echo=True)
        assert scores is not None
        for row, (want_ids, want_scores, _) in enumerate(expected):
            assert ids[row] == want_ids[i]
            assert scores[row][0] is None
            got = torch.tensor(scores[row][1:])
            torch.testing.assert_close(got, want_scores[i], atol=1e-4, rtol=0)


def test_greedy_ids_of_one_prompt(
    demo: Llama,
    groups: list[list[list[int]]],
    expected: Expected,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo.tokenizer, "stop_tokens", [])
    for prompts, (want, _, _) in zip(groups, expected, strict=True):
        [got], _ = demo.generate([prompts[0]], 64, temperature=0, echo=True)
        assert got == want[0]


@pytest.mark.parametrize(("temperature", "top_p"), [(0.6, 0.9), (1.0, 1.0), (1.3, 0.5), (0.8, 0.0)])
def test_sampled_ids_of_one_prompt(
    demo: Llama,
    meta: torch.nn.Module,
    groups: list[list[list[int]]],
    temperature: float,
    top_p: float,
) -> None:
    stop = set(demo.tokenizer.stop_tokens)
    for seed, prompts in enumerate(groups):
        torch.manual_seed(seed)
        want = reference.sampled(meta, prompts[1], 12, stop, temperature, top_p)
        torch.manual_seed(seed)
        [got], _ = demo.generate([prompts[1]], 12, temperature=temperature, top_p=top_p)
        assert got == want and len(got) > 2


def test_seed_of_build_draws_as_meta(
    demo_dir: Path, meta: torch.nn.Module, groups: list[list[list[int]]]
) -> None:
    """Nothing draws random numbers between the seeding in `build` and the first sample."""
    path, prompt = demo_dir / "tokenizer.model", groups[1][2]
    llama = Llama.build(demo_dir, path, 64, 1, seed=7, device="cpu", dtype=torch.float32)
    [got], _ = llama.generate([prompt], 12)
    torch.manual_seed(7)
    assert got == reference.sampled(meta, prompt, 12, set(llama.tokenizer.stop_tokens), 0.6, 0.9)


def test_bfloat16_ids(demo_dir: Path, one_rank_group: None, groups: list[list[list[int]]]) -> None:
    """Greedy and sampled ids of single prompts in the dtype of Meta's checkpoints."""
    params = json.loads((demo_dir / "params.json").read_text())
    weights = torch.load(demo_dir / "consolidated.00.pth", weights_only=True)
    meta = meta_model(params | {"max_batch_size": 1, "max_seq_len": 64}, weights).bfloat16()
    path = demo_dir / "tokenizer.model"
    llama = Llama.build(demo_dir, path, 64, 1, device="cpu", dtype=torch.bfloat16, exact=True)
    for seed, (temperature, top_p) in enumerate([(1e-5, 0.0), (0.6, 0.9), (1.0, 1.0)]):
        prompt = groups[seed][3]
        torch.manual_seed(seed)
        want = reference.sampled(meta, prompt, 16, set(), temperature, top_p)
        torch.manual_seed(seed)
        [got], _ = llama.generate([prompt], 16, temperature=temperature, top_p=top_p)
        assert got == want[: len(got)] and len(got) > 2
