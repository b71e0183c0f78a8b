"""Adapters that are damaged, of another base, or have options that are not computed here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama.checkpoints.adapter import read_adapter, write_adapter
from llama.checkpoints.adapter_report import adapter_problems, describe_folder
from llama.checkpoints.convert import convert, quantize
from llama.checkpoints.formats.peft import parse_config
from llama.checkpoints.open import open_checkpoint
from llama.checkpoints.source import Source
from llama.layers.lora import LoRAConfig
from tests.checkpoints.adapters import HF_Q, bases, random_adapter

__all__ = ["bases"]
CONFIG = LoRAConfig(4, 8, targets=("wq", "w2"))
PLAIN = {"peft_type": "LORA", "target_modules": ["q_proj"]}


@pytest.fixture
def source(bases: dict[str, Path]) -> Source:
    return open_checkpoint(bases["meta"])


@pytest.fixture
def adapter(source: Source, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_adapter(folder, source, CONFIG, random_adapter(source, CONFIG)[0])
    return folder


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only adapters of type 'LORA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"target_modules": r".*\.q_proj"}, r"pattern '.*' *; only 'all-linear' or a list"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": ["q_proj", "lm_head"]}, "has lm_head; only .* as modules_to_save"),
        ({"target_modules": ["layers.0.self_attn.q_proj"]}, "has layers.0.self_attn.q_proj"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"rank_pattern": {"q_proj": 2}}, "sets rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "sets alpha_pattern"),
        ({"layers_to_transform": [0]}, "sets layers_to_transform"),
        ({"layers_to_transform": 0}, "sets layers_to_transform"),
        ({"exclude_modules": ["v_proj"]}, "sets exclude_modules"),
        ({"fan_in_fan_out": True}, "sets fan_in_fan_out"),
        ({"lora_bias": True}, "sets lora_bias"),
        ({"trainable_token_indices": [1]}, "sets trainable_token_indices"),
        ({"alora_invocation_tokens": [1]}, "sets alora_invocation_tokens"),
        ({"use_qalora": True}, "sets use_qalora"),
        ({"of_the_future": 0.5}, "sets of_the_future"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base's weights"),
        ({"modules_to_save": ["score"]}, r"modules_to_save is \['score'\]"),
        ({"use_dora": "yes"}, "use_dora must be true or false"),
        ({"r": 0}, "rank must be a positive integer, not 0"),
        ({"lora_alpha": "x"}, "alpha must be a positive number"),
    ],
)
def test_options_that_change_the_result(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        parse_config(PLAIN | change)


@pytest.mark.parametrize(
    "key",
    [
        *("peft_type", "target_modules", "modules_to_save", "bias", "init_lora_weights"),
        *("use_dora", "r", "lora_alpha", "lora_dropout", "x" * 9999),
    ],
)
def test_values_are_cut_in_messages(key: str) -> None:
    for value in ("\x1b[31m" * 5000, ["\x1b[31m" * 5000]):
        with pytest.raises(ValueError) as error:
            parse_config(PLAIN | {key: value})
        assert len(str(error.value)) < 400 and str(error.value).isprintable()


@pytest.mark.parametrize(
    ("modules", "targets"),
    [
        ("all-linear", ("wq", "wk", "wv", "wo", "w1", "w2", "w3")),
        (["v_proj", "self_attn.q_proj"], ("wq", "wv")),
        ("o_proj", ("wo",)),
    ],
)
def test_targets(modules: object, targets: tuple[str, ...]) -> None:
    found = parse_config(PLAIN | {"target_modules": modules, "init_lora_weights": "gaussian"})
    assert set(found.lora.targets) == set(targets)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {name: w.clone() for name, w in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


TENSORS: list[tuple[str, Callable[[dict[str, torch.Tensor]], object], str]] = [
    ("missing", lambda t: t.pop(f"{HF_Q}.lora_B.weight"), r"missing: layers.0.*wq.lora_b"),
    ("unknown", lambda t: t.update({"score.weight": torch.ones(1)}), "score.weight, which no"),
    ("layer", lambda t: t.update({HF_Q.replace("0", "9") + ".lora_A.weight": torch.ones(4, 64)}),
     r"unknown: layers.9"),
    ("NaN", lambda t: t[f"{HF_Q}.lora_A.weight"].fill_(torch.nan), "NaN or infinite"),
    ("shape", lambda t: t.update({f"{HF_Q}.lora_B.weight": torch.ones(60, 4)}), r"\(60, 4\)"),
    ("vector", lambda t: t.update({f"{HF_Q}.lora_B.weight": torch.ones(4)}), r"\(4,\)"),
    ("type", lambda t: t.update({f"{HF_Q}.lora_B.weight": torch.ones(64, 4).int()}), "type I32"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "match"), [t[1:] for t in TENSORS], ids=[t[0] for t in TENSORS])
def test_wrong_tensors(
    source: Source, adapter: Path, change: Callable[..., object], match: str
) -> None:
    edit(adapter, change)
    with pytest.raises(ValueError, match=match) as e:
        read_adapter(adapter, source)
    assert str(adapter) in str(e.value)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: f.write_bytes(f.read_bytes()[:-9]), "truncated or damaged"),
    "LFS": (lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git-LFS"),
    "page": (lambda f: f.write_text("<!DOCTYPE html><html>"), "web page"),
    "empty": (lambda f: f.write_text(""), "truncated or damaged"),
    "gone": (lambda f: f.unlink(), r"has no adapter_model.safetensors"),
    "bin": (lambda f: f.rename(f.with_suffix(".bin")), r"adapter_model.bin, .* save the adapter"),
}


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files(source: Source, adapter: Path, kind: str) -> None:
    damage, match = FILES[kind]
    damage(adapter / "adapter_model.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        read_adapter(adapter, source)
    assert len(adapter_problems(adapter)) == 1


def test_wrong_folders(source: Source, adapter: Path, bases: dict[str, Path]) -> None:
    with pytest.raises(FileNotFoundError, match=r"no adapter at .*nowhere"):
        read_adapter(adapter / "nowhere", source)
    with pytest.raises(FileNotFoundError, match="download it first: llama3 download me/mine"):
        read_adapter("me/mine", source)
    with pytest.raises(FileNotFoundError, match="is a checkpoint, not an adapter"):
        read_adapter(bases["hf"], source)
    with pytest.raises(ValueError, match=r"is an adapter, not a checkpoint; .* --adapter"):
        open_checkpoint(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json is not JSON"):
        read_adapter(adapter, source)


def test_another_base(
    source: Source, adapter: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Other sizes always; other norms where this library wrote the adapter."""
    with pytest.raises(ValueError, match=r"wrong shape: .* Give the base that the adapter"):
        read_adapter(adapter, open_checkpoint(tiny_checkpoint(vocab_size=512, multiple_of=48)))
    other = shutil.copytree(source.path, tmp_path / "other")
    state = torch.load(other / "consolidated.00.pth")
    state["norm.weight"] *= 2
    torch.save(state, other / "consolidated.00.pth")
    with pytest.raises(ValueError, match=rf"another .*other .*give its base, .*{source.path.name}"):
        read_adapter(adapter, open_checkpoint(other))
    (adapter / "llama3_adapter.json").unlink()
    read_adapter(adapter, open_checkpoint(other))


def test_one_base_in_all_layouts(source: Source, adapter: Path, tmp_path: Path) -> None:
    convert(source.path, tmp_path / "bf16", dtype="bf16")
    convert(source.path, tmp_path / "hf", "hf", dtype="fp16")
    quantize(source.path, tmp_path / "int8", "int8")
    for name in ("bf16", "hf", "int8"):
        assert read_adapter(adapter, open_checkpoint(tmp_path / name)).config == CONFIG


def test_names_of_states(source: Source, adapter: Path) -> None:
    """Tensors of a state that was saved without PEFT's function have the adapter's name."""
    expected = read_adapter(adapter, source)
    path = adapter / "adapter_model.safetensors"
    renamed = {k.replace(".weight", ".default.weight"): w for k, w in load_file(path).items()}
    save_file(renamed, path)
    found = read_adapter(adapter, source)
    assert found.weights.keys() == expected.weights.keys()


def test_report(source: Source, adapter: Path) -> None:
    text = describe_folder(adapter)
    n = 2 * (4 * (64 + 64) + 4 * (176 + 64))  # layers x (wq + w2)
    for part in (str(source.path), "LoRA of rank 4, scale 2", "wq, w2 of 2 layers", f"{n:,}"):
        assert part in text
    assert adapter_problems(adapter) == []
    edit(adapter, lambda t: t.pop(f"{HF_Q}.lora_B.weight"))
    [problem] = adapter_problems(adapter)
    assert "lacks: layers.0.attention.wq.lora_b; save or download" in problem


def test_not_finite_is_not_written(source: Source, tmp_path: Path) -> None:
    weights, _ = random_adapter(source, CONFIG)
    weights["layers.0.attention.wq.lora_a"][0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"wq.lora_a has NaN or infinite"):
        write_adapter(tmp_path, source, CONFIG, weights)
    assert list(tmp_path.iterdir()) == []
