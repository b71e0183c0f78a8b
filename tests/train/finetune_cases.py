"""Helpers for the tests of fine-tuning: dialogs, and the loss that transformers computes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from llama.tokenizer import Tokenizer
from llama.train.finetune_settings import FinetuneSettings

Dialogs = Sequence[tuple[str, str]]
QUICK: dict[str, Any] = {
    "batch_size": 4, "steps": 6, "warmup": 1, "lr": 1e-2, "eval_every": 3, "samples": 1,
    "dtype": "float32",
}  # fmt: skip


def quick(**changes: Any) -> FinetuneSettings:
    """Settings of a short run."""
    return FinetuneSettings(**(QUICK | changes))


def sums(start: int, count: int) -> list[tuple[str, str]]:
    """Questions and answers of unequal lengths."""
    return [
        (f"What is {i} + {i % 7}?", "!" * (i % 5) + str(i + i % 7))
        for i in range(start, start + count)
    ]


def write_dialogs(path: Path, dialogs: Dialogs) -> Path:
    """JSON lines in the format of OpenAI's messages."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }
        for question, answer in dialogs
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def prompt_and_answer(
    tokenizer: Tokenizer, question: str, answer: str
) -> tuple[list[int], list[int]]:
    """Ids of Llama 3's chat prompt, written by hand, and of the answer with its end."""
    special = tokenizer.special_tokens
    start, end, turn = (
        special[f"<|{name}|>"] for name in ("start_header_id", "end_header_id", "eot_id")
    )

    def text(words: str) -> list[int]:
        return tokenizer.encode(words, bos=False)

    header = [start, *text("assistant"), end, *text("\n\n")]
    user = [start, *text("user"), end, *text("\n\n"), *text(question), turn]
    return [special["<|begin_of_text|>"], *user, *header], [*text(answer), turn]


@torch.no_grad()
def transformers_loss(model: Any, tokenizer: Tokenizer, dialogs: Dialogs) -> float:
    """Nats per id of the answers, by a model of transformers, one dialog at a time."""
    nats, count = 0.0, 0
    for dialog in dialogs:
        prompt, answer = prompt_and_answer(tokenizer, *dialog)
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        nats += float(F.cross_entropy(logits.double(), torch.tensor(answer), reduction="sum"))
        count += len(answer)
    return nats / count
