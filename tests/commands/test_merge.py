"""`llama3 merge`, and `inspect` and `verify` of an adapter: output, and mistakes in one line."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from llama.checkpoints.adapter import write_adapter
from llama.checkpoints.open import open_checkpoint
from llama.commands.parser import parse
from llama.layers.lora import LoRAConfig
from tests.checkpoints.adapters import bases, random_adapter

__all__ = ["bases"]


@pytest.fixture
def adapter(bases: dict[str, Path], tmp_path: Path) -> Path:
    source, config = open_checkpoint(bases["meta"]), LoRAConfig(2, 4, targets=("wq",))
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder, source, config, random_adapter(source, config)[0])
    return folder


def call(line: str) -> None:
    parse(shlex.split(line))()


def test_merge(
    bases: dict[str, Path], adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The layout is the base's unless `--to` names one; the result verifies."""
    for base, flags, layout in (
        ("meta", "", "meta"),
        ("hf", "", "hf"),
        ("hf", "--to meta", "meta"),
    ):
        out = tmp_path / "out"
        call(f"merge {bases[base]} {adapter} {out} --force {flags}")
        assert capsys.readouterr().out == f"{out}\n"
        assert open_checkpoint(out).layout == layout
        call(f"verify {out}")
        assert "every check passed" in capsys.readouterr().out


def test_an_adapter_is_described(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(f"inspect {adapter}")
    assert "LoRA of rank 2" in capsys.readouterr().out
    call(f"verify {adapter}")
    assert "every check passed" in capsys.readouterr().out
    (adapter / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    with pytest.raises(SystemExit):
        call(f"verify {adapter}")
    assert "peft_type is 'LOHA'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", ["complete x -m {}", "convert {} out", "quantize {} out --scheme int8"]
)
def test_an_adapter_is_no_checkpoint(adapter: Path, line: str) -> None:
    with pytest.raises(ValueError, match=r"is an adapter, not a checkpoint; .*--adapter"):
        call(line.format(adapter))
