"""What `llama3 finetune` says at its end, and where it cannot resume."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llama.checkpoints.convert import quantize
from llama.commands.finetune import next_commands
from llama.train import FinetuneSettings, Settings
from llama.train.state import check_resumable, record_settings


def test_next_commands_are_possible(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], byte_tokenizer_path: Path
) -> None:
    """A quantized base is not merged, and a vocabulary without chat format does not chat."""
    base = tiny_checkpoint(vocab_size=512)
    shutil.copy(byte_tokenizer_path, base / "tokenizer.model")
    lora, full = FinetuneSettings(), FinetuneSettings(method="full")
    assert next_commands(str(base), "out", lora).splitlines()[1:] == [
        f"  llama3 chat -m {base} --adapter out",
        f"  llama3 serve -m {base} --adapter out",
        f"  llama3 merge {base} out out-merged",
    ]
    int8 = quantize(base, tmp_path / "int8", "int8")
    assert "merge" not in next_commands(str(int8), "out", lora)
    (base / "tokenizer.model.json").write_text('{"chat_format": null}')
    assert "llama3 complete " in next_commands(str(base), "out", full)
    assert "llama3 chat" not in next_commands(str(base), "out", full)


def test_the_run_of_another_verb_is_not_resumed(tmp_path: Path) -> None:
    record_settings(tmp_path, Settings(), 1, "data")
    with pytest.raises(ValueError, match="is of another verb or version; start one in a new"):
        check_resumable(tmp_path, FinetuneSettings(), 1)
    assert check_resumable(tmp_path, Settings(), 1) == "data"
