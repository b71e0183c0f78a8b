"""finetune_data.py, and what `finetune` says about memory: messages that must be right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llama.tokenizer import Tokenizer
from llama.train.finetune_data import load_samples
from llama.train.finetuning import Finetuning, advice_on_memory
from tests.train.finetune_cases import quick, sums, write_dialogs


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Dialogs, and pairs of answers."""
    pairs = [{"prompt": q, "chosen": a, "rejected": "?"} for q, a in sums(0, 5)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return {
        "dialogs": write_dialogs(tmp_path / "dialogs.jsonl", sums(0, 5)),
        "pairs": tmp_path / "pairs.jsonl",
    }


@pytest.mark.parametrize(
    ("train", "held", "changes", "message"),
    [
        ("pairs", "dialogs", {"method": "dpo"}, "dialogs.jsonl, line 1: method dpo needs a chosen"),
        ("dialogs", "pairs", {}, "pairs.jsonl, line 1: a chosen and a rejected answer are for"),
    ],
)
def test_held_out_data_of_another_kind(
    files: dict[str, Path], byte_tokenizer_path: Path, train: str, held: str, changes: Any,
    message: str,
) -> None:  # fmt: skip
    settings, tokenizer = (
        quick(val_data=str(files[held]), **changes),
        Tokenizer(byte_tokenizer_path),
    )
    with pytest.raises(ValueError, match=message):
        load_samples([files[train]], settings, tokenizer, context=128, vocab_size=512)


def test_share_of_packed_rows(files: dict[str, Path], byte_tokenizer_path: Path) -> None:
    """Of inputs: a row's last id is none."""
    settings, path = quick(val_fraction=0.0, pack=True), files["dialogs"]
    write_dialogs(path, [("How much?", "3")] * 4)
    found = load_samples([path], settings, Tokenizer(byte_tokenizer_path), 128, 512)
    assert found.summary()[1] == "packed: 4 rows, 100% full"


def test_too_little_memory() -> None:
    class Task:
        def remedy(self) -> str:
            return "try --recompute"

    task: Finetuning = Task()  # type: ignore[assignment]
    with (
        pytest.raises(MemoryError, match="cpu has too little memory; try --recompute"),
        advice_on_memory(torch.device("cpu"), task),
    ):
        torch.empty(1 << 60)
