"""Sizes, records, pipes and names that made readers hang, fill the memory or read wrong numbers.

The random ones are in tests/fuzz.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from llama.checkpoints.inspect import describe
from llama.checkpoints.open import open_checkpoint
from llama.checkpoints.verify import verify
from llama.distributed.sharding import rank_counts
from llama.model import ModelArgs
from tests.fuzz.bases import archive_of, base, records_of, write_base, write_gguf_with
from tests.fuzz.bounds import bounds

HUGE = [2**31 - 2, 2**31, 2**62, 2**64, 10**300]
SIZES = [
    *[("meta", "params.json", key) for key in ("n_layers", "dim", "n_heads", "vocab_size")],
    *[("meta", "params.json", key) for key in ("multiple_of", "ffn_dim_multiplier", "max_seq_len")],
    *[("int4", "params.json", key) for key in ("n_layers", "dim", "n_kv_heads", "multiple_of")],
    *[("hf", "config.json", key) for key in ("num_hidden_layers", "hidden_size", "vocab_size")],
    *[("hf", "config.json", key) for key in ("num_attention_heads", "intermediate_size")],
]


@pytest.mark.parametrize("size", HUGE)
@pytest.mark.parametrize(("layout", "file", "key"), SIZES)
def test_huge_sizes(layout: str, file: str, key: str, size: int, tmp_path: Path) -> None:
    """Before anything loops over them or is allocated."""
    path = write_base(tmp_path / "model", base(layout))
    values: dict[str, Any] = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(values | {key: size}))
    with bounds():
        if key == "max_seq_len" and size < 2**31:  # the trained context, which is not allocated
            describe(open_checkpoint(path))
            return
        with pytest.raises(ValueError, match=str(path)):
            describe(open_checkpoint(path))
        assert verify(path, open_checkpoint)


@pytest.mark.parametrize("layout", ["int8", "int4"])
def test_long_rows_of_a_quantized_model(layout: str, tmp_path: Path) -> None:
    """16 rows of them were allocated, which ended in a RuntimeError of torch."""
    path = write_base(tmp_path / "model", base(layout))
    params: dict[str, Any] = json.loads((path / "params.json").read_text())
    (path / "params.json").write_text(json.dumps(params | {"multiple_of": 2**23}))
    with bounds(), pytest.raises(ValueError, match=f"{path} do not fit its sizes"):
        open_checkpoint(path).args()


@pytest.mark.parametrize("size", [2**31 - 2, 2**32 - 1])
@pytest.mark.parametrize("key", ["block_count", "embedding_length", "attention.head_count"])
def test_huge_sizes_in_a_gguf(key: str, size: int, tmp_path: Path) -> None:
    write_gguf_with(tmp_path / "a.gguf", {f"llama.{key}": size})
    with bounds(), pytest.raises(ValueError, match=r"a\.gguf"):
        describe(open_checkpoint(tmp_path / "a.gguf"))


def test_ranks_of_many_heads() -> None:
    """Heads are not counted one by one."""
    heads = 2**28
    with bounds():
        args = ModelArgs(dim=2 * heads, n_heads=heads, n_kv_heads=heads, multiple_of=heads)
        assert rank_counts(args) == [2**i for i in range(29)]


def records() -> list[str]:
    return [name for name in records_of(base("meta")["consolidated.00.pth"]) if "/data/" in name]


@pytest.mark.parametrize("part", [0, 0.5])
@pytest.mark.parametrize("index", range(12))
def test_a_short_record_of_a_pth(index: int, part: float, tmp_path: Path) -> None:
    """The missing numbers were read from the next record, and `verify` passed the empty ones."""
    name, path = records()[index], write_base(tmp_path / "model", base("meta"))
    pth = path / "consolidated.00.pth"
    content = records_of(pth.read_bytes())
    content[name] = content[name][: int(len(content[name]) * part)]
    pth.write_bytes(archive_of(content))
    key = name.rpartition("/")[2]
    with pytest.raises(ValueError, match=rf"pth is damaged \(its record data/{key} has .* bytes\)"):
        open_checkpoint(path)
    [problem] = verify(path, open_checkpoint)
    assert f"its record data/{key} has" in problem


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("meta", "consolidated.00.pth"),
        ("meta", "params.json"),
        ("meta", "tokenizer.model"),
        ("meta", "checklist.chk"),
        ("hf", "model-00001-of-00002.safetensors"),
        ("hf", "model.safetensors.index.json"),
        ("hf", "config.json"),
    ],
)
def test_pipes(layout: str, name: str, tmp_path: Path) -> None:
    """Opening one waits for its writer."""
    path = write_base(tmp_path / "model", base(layout))
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    assert any(
        f"{path / name} is a pipe or a device" in line for line in verify(path, open_checkpoint)
    )
    if name.endswith((".pth", ".safetensors")):
        with pytest.raises(ValueError, match=f"{path}"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    "name", ["consolidated.99999999999.pth", "model-00001-of-99999999999.safetensors"]
)
def test_numbers_in_names(name: str, tmp_path: Path) -> None:
    layout = "meta" if name.endswith("pth") else "hf"
    path = write_base(tmp_path / "model", base(layout))
    (path / "model.safetensors.index.json").unlink(missing_ok=True)
    (path / name).write_bytes(b"x")
    with bounds():
        with pytest.raises((ValueError, OSError), match="99999999999"):
            open_checkpoint(path)
        assert verify(path, open_checkpoint)
