"""benchmarks.finetune runs on a tiny model, and its two systems compute the same updates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import finetune


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Callable[..., Path], byte_tokenizer_path: Path) -> str:
    folder = tiny_checkpoint(vocab_size=512, multiple_of=64)
    (folder / "tokenizer.model").symlink_to(byte_tokenizer_path)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"instruction": "Count", "input": "", "output": "one " * n} for n in range(1, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], function: Any, **options: Any) -> dict[str, Any]:
    """{row: {column: median}} of the result in the last line."""
    function(**options)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    found: dict[str, Any] = {"settings": result["settings"]}
    for figure in result["figures"]:
        found.setdefault(figure["row"], {})[figure["column"]] = figure["median"]
    return found


@pytest.mark.parametrize("targets", ["wq,wk,wv,wo,w1,w2,w3", "wq,wv"])
def test_peft(checkpoint: str, data: str, targets: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Three updates from the same adapter: the same losses, which fall."""
    common = {"checkpoint": checkpoint, "data": data, "targets": targets, "batch_size": 3}
    found = run(capsys, finetune.peft, runs=2, **common)
    assert found["settings"]["largest difference of losses"] < 1e-5
    assert found["llama3"]["last loss"] == pytest.approx(found["peft"]["last loss"], abs=1e-5)
    assert found["llama3 / peft"]["LoRA"] > 0


def test_others(checkpoint: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = {"checkpoint": checkpoint, "data": data, "runs": 1}
    found = run(capsys, finetune.full, batch_size=2, **common)
    assert found["lora / full"]["update"] > 0
    found = run(capsys, finetune.pack, batch_size=2, packed_rows=1, max_seq_len=200, **common)
    assert found["packed / single"]["targets"] > 0
    settings = finetune.settings_of(quantize="int4", recompute=True, dtype="float32")
    peaks = finetune.Measured(checkpoint, data, settings).run(updates=1)
    assert peaks["resident"] > 0 and peaks["peak_GiB"] > 0
