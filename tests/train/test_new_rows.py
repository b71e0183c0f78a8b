"""From an extended vocabulary to a merged checkpoint: only the rows of new tokens are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llama.checkpoints.merge import merge
from llama.checkpoints.open import open_checkpoint, open_tokenizer
from llama.train.extend_vocabulary import extend_vocabulary
from llama.train.finetune_settings import FinetuneSettings
from llama.train.finetuning import finetune
from tests.checkpoints.test_extended import NEW, PADDED, write_base
from tests.train.test_continued_merges import CHINESE

VOCABULARY = ("tok_embeddings.weight", "output.weight")
__all__ = ["write_base"]  # a fixture


def settings(**changes: Any) -> FinetuneSettings:
    values: dict[str, Any] = {
        "format": "text", "block": 16, "batch_size": 2, "steps": 3, "warmup": 1, "samples": 1,
        "val_fraction": 0.2, "embeddings_from": PADDED, "embeddings_lr": 10.0, "lr": 1e-3,
        "dtype": "float32",
    }  # fmt: skip
    return FinetuneSettings(**values | changes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["embeddings", "lora"])
def test_old_rows_stay(
    method: str, tied: bool, write_base: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, base, out = tmp_path / "zh.txt", tmp_path / "base", tmp_path / "out"
    data.write_text(CHINESE, encoding="utf-8")
    extend_vocabulary(write_base(tied), [data], base, NEW)
    more = {"train_embeddings": True} if method == "lora" else {}
    finetune(base, [data], out, settings(method=method, **more), device="cpu")
    assert f"embedding and output from row {PADDED} on" in capfd.readouterr().out
    if method == "lora":
        merge(base, out, tmp_path / "merged")
        out = tmp_path / "merged"
    before, after = open_checkpoint(base), open_checkpoint(out)
    assert after.tied == tied
    for name in VOCABULARY:
        old, new = before.read(name), after.read(name)
        assert new[:PADDED].equal(old[:PADDED])
        changed = (new[PADDED:] != old[PADDED:]).any(1)
        assert changed.all() or (name == "tok_embeddings.weight" and not tied and changed.any())
    ids = [open_tokenizer(source).encode(CHINESE) for source in (before, after)]
    assert ids[0] == ids[1]


def test_all_rows_are_trained_otherwise(write_base: Any, tmp_path: Path) -> None:
    data, base = tmp_path / "zh.txt", write_base()
    data.write_text(CHINESE, encoding="utf-8")
    finetune(
        base, [data], tmp_path / "out", settings(method="embeddings", embeddings_from=0),
        device="cpu",
    )  # fmt: skip
    before, after = open_checkpoint(base), open_checkpoint(tmp_path / "out")
    assert (before.read("output.weight") != after.read("output.weight")).any(1)[:512].all()


def test_bad_rows(write_base: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="embeddings_from needs train_embeddings"):
        settings(method="lora")
    with pytest.raises(ValueError, match="fsdp cannot train some rows only"):
        settings(method="embeddings", parallel="fsdp")
    with pytest.raises(ValueError, match="embeddings_from must be an integer from 0 on, not -1"):
        settings(embeddings_from=-1)
    data = tmp_path / "zh.txt"
    data.write_text(CHINESE, encoding="utf-8")
    wrong = settings(method="embeddings", embeddings_from=PADDED)
    with pytest.raises(ValueError, match=f"embeddings_from {PADDED}: the rows are 0 to"):
        finetune(write_base(), [data], tmp_path / "out", wrong, device="cpu")
